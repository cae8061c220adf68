"""Language codes, however they are written: tr, tr-TR, tr_TR and tur are one language."""

from __future__ import annotations

from functools import cache


@cache
def language_names(tag: str) -> tuple[str, ...]:
    """Names to look a language up by, the most exact first: of zh-cmn-Hans-CN that tag, zh_Hans_CN, zh-Hans-CN, zh; of azj also az.

    What is no language code stands for itself; the empty tag has no names.
    """
    import langcodes

    if not tag:
        return ()
    names = [tag]
    try:
        language = langcodes.Language.get(tag)
        standard = language.to_tag()
        names += [standard.replace("-", "_"), standard, str(language.language)]
        names.append(str(language.prefer_macrolanguage().language))
    except ValueError:  # what langcodes raises for a tag of another shape
        names.append(tag.lower())
    return tuple(dict.fromkeys(name for name in names if name))


def is_language(tag: str, *codes: str) -> bool:
    """Whether a tag is of one of these languages, given by their two-letter codes."""
    return not {*language_names(tag)}.isdisjoint(codes)
