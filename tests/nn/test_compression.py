"""The compressed linear layer: codes, masks, products and gradients against the formulas of its sources."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.nn import functional as F

from asrkit.config import from_dict
from asrkit.errors import UserError
from asrkit.nn import compression
from asrkit.nn.compression import CompressedLinear, find_mask, input_codes, integer_product, size_in_bits, weight_codes
from asrkit.nn.compression_config import ActivationQuantization, Compression, Mask, WeightQuantization

BITS = st.sampled_from([2, 4, 8])
SCALES = st.sampled_from(["tensor", "channel", "block"])


def random_weight(outputs: int, inputs: int, seed: int) -> torch.Tensor:
    """Rows of very different sizes, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    weight *= 10.0 ** torch.randint(-4, 5, (outputs, 1), generator=generator)
    if outputs > 2:
        weight[1] = 0
    return weight


def layer(inputs: int, outputs: int, seed: int = 0, **how: Any) -> CompressedLinear:
    torch.manual_seed(seed)
    return CompressedLinear(inputs, outputs, Compression(**how))


@settings(deadline=None, max_examples=60)
@given(BITS, SCALES, st.sampled_from(["center", "edge"]), st.sampled_from(["half_up", "half_even"]), st.integers(1, 5),
       st.integers(1, 4), st.integers(0, 10**6))  # fmt: skip
def test_codes(bits: Any, scale: Any, bound: Any, rounding: Any, outputs: int, blocks: int, seed: int) -> None:
    how = WeightQuantization(bits=bits, scale=scale, block_size=4, bound=bound, rounding=rounding)
    weight = random_weight(outputs, 4 * blocks, seed)
    found = weight_codes(weight, how)
    assert torch.equal(found.codes, found.codes.round()) and found.codes.abs().max() <= how.largest
    assert found.scale.shape == {"tensor": (1, 1), "channel": (outputs, 1), "block": (outputs, blocks)}[scale]
    steps = found.spread(found.scale)
    # Half a step, or within it of the range's end: there the edge bound gives up half a step of the largest.
    slack = 0.5 if bound == "center" else 0.500001 + (0.5 if bits < 8 else 0.0)
    assert bool(((found.weights() - weight).abs() <= steps * (slack + 1e-5)).all())
    if bound == "center":
        again = weight_codes(found.weights(), how)
        assert torch.equal(again.codes, found.codes)
        groups = weight.reshape({"tensor": (1, 1, -1), "channel": (outputs, 1, -1), "block": (outputs, -1, 4)}[scale])
        peaks = groups.abs().amax(-1)
        reached = found.codes.reshape(groups.shape).abs().amax(-1)
        assert torch.equal(reached, torch.where(peaks > 0, float(how.largest), 0.0) * torch.ones_like(peaks))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6))
def test_asymmetric_two_bits(outputs: int, blocks: int, seed: int) -> None:
    how = WeightQuantization(bits=2, symmetric=False, scale="block", block_size=8)
    weight = torch.randn(outputs, 8 * blocks, generator=torch.Generator().manual_seed(seed))
    found = weight_codes(weight, how)
    assert set(found.codes.unique().tolist()) <= {-2.0, -1.0, 0.0, 1.0}
    codes, groups = (x.reshape(outputs, blocks, 8) for x in (found.codes, weight))
    assert bool((codes.amin(-1) == -2).all()) and bool((codes.amax(-1) == 1).all())
    back = found.weights().reshape(groups.shape)
    for chosen in (groups.argmin(-1, keepdim=True), groups.argmax(-1, keepdim=True)):
        torch.testing.assert_close(back.gather(-1, chosen), groups.gather(-1, chosen), rtol=1e-5, atol=1e-5)
    # The product from the parts: s (x q) - sum(x) (s zp), block by block.
    x = torch.randn(3, 8 * blocks)
    assert found.offset is not None
    parts = torch.einsum("nkb,okb->nok", x.reshape(3, blocks, 8), codes) * found.scale
    parts = parts - x.reshape(3, blocks, 8).sum(-1)[:, None] * found.offset
    torch.testing.assert_close(parts.sum(-1), F.linear(x, found.weights()), rtol=1e-4, atol=1e-4)
    whole = weight_codes(weight, WeightQuantization(bits=2, symmetric=False, scale="block", block_size=8 * blocks))
    channel = weight_codes(weight, WeightQuantization(bits=2, symmetric=False))
    assert torch.equal(whole.codes, channel.codes)


@settings(deadline=None, max_examples=30)
@given(BITS, SCALES, st.integers(0, 10**6))
def test_a_clip_search_is_never_worse(bits: Any, scale: Any, seed: int) -> None:
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed)) ** 3
    errors = [
        float((weight_codes(weight, WeightQuantization(bits=bits, scale=scale, block_size=8, clip=clip)).weights() - weight)
              .square().sum())
        for clip in ("none", "search")
    ]  # fmt: skip
    assert errors[1] <= errors[0] * (1 + 1e-6)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 40),
    st.one_of(st.integers(1, 1500), st.integers(1, 190).map(lambda eighths: 8 * eighths)),
    st.sampled_from([3, 8, 24]),
    st.sampled_from([7, 127, 255]),
    st.sampled_from([1, 7, 127]),
    st.integers(0, 10**6),
)
def test_products_are_those_of_integers(
    rows: int, inputs: int, outputs: int, x_size: int, w_size: int, seed: int
) -> None:
    """Emulated in float, and in int8 where torch and the processor multiply so."""
    generator = torch.Generator().manual_seed(seed)
    # All of one sign and near the largest, so that sums get as large as they can.
    x = torch.randint(x_size - 1, x_size + 1, (rows, inputs), generator=generator)
    codes = torch.randint(w_size - 1, w_size + 1, (outputs, inputs), generator=generator)
    codes = codes * torch.randint(0, 2, codes.shape[:1], generator=generator).mul(2).sub(1).unsqueeze(1)
    expected = x.to(torch.int64) @ codes.to(torch.int64).t()
    for native in {False, compression.multiplies_int8("cpu")}:
        with mock.patch.object(compression, "multiplies_int8", lambda device, native=native: native):
            found = integer_product(x.float().view(1, rows, inputs), codes.float(), x_size, w_size)
        assert torch.equal(found.to(torch.int64), expected.unsqueeze(0))


@pytest.mark.parametrize("scale", ["token", "tensor", "onnx"])
def test_no_input_has_no_output(scale: Any) -> None:
    """Audio too short for an encoder frame."""
    rounding: Any = "half_even" if scale == "onnx" else "half_up"
    inputs = ActivationQuantization(bits=8, scale=scale, rounding=rounding)
    how = Compression(weights=WeightQuantization(bits=8), activations=inputs)
    layer = CompressedLinear(8, 3, how)
    assert layer(torch.zeros(1, 0, 8)).shape == (1, 0, 3)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(["token", "tensor", "onnx"]), st.sampled_from([4, 8]), st.integers(0, 10**6))
def test_inputs(scale: Any, bits: Any, seed: int) -> None:
    assume(scale != "onnx" or bits == 8)
    how = ActivationQuantization(bits=bits, scale=scale, rounding="half_even" if scale == "onnx" else "half_up")
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(seed)) * 10
    found = input_codes(x, how)
    values = found.codes if found.zero_point is None else found.codes - found.zero_point
    assert torch.equal(found.codes, found.codes.round())
    assert bool(((values * found.scale - x).abs() <= found.scale * 0.5001 + 1e-6).all())
    if scale == "onnx":
        assert found.codes.min() >= 0 and found.codes.max() <= 255
        expected = torch.quantize_per_tensor(x, float(found.scale), int(found.zero_point), torch.quint8)  # type: ignore[arg-type]
        assert float((expected.int_repr().float() - found.codes).abs().max()) <= 1
    else:
        assert found.codes.abs().max() == 2 ** (bits - 1) - 1


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([4, 8, None]), BITS, st.sampled_from(["tensor", "channel"]), st.booleans(), st.integers(0, 10**6)
)
def test_gradients_are_those_of_the_formulas(act_bits: Any, bits: Any, scale: Any, masked: bool, seed: int) -> None:
    how: dict[str, Any] = {"weights": WeightQuantization(bits=bits, scale=scale)}
    if act_bits:
        how["activations"] = ActivationQuantization(bits=act_bits)
    if masked:
        how["mask"] = Mask(keep=2, group=4)
    made = layer(8, 5, seed, **how)
    if masked:
        made.mask.copy_(find_mask(made.weight.detach().abs(), how["mask"]))
    x = torch.randn(2, 3, 8, requires_grad=True)
    y = made(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    codes = made.codes()
    operand = x.detach()
    if act_bits:
        quantized = input_codes(operand, how["activations"])
        operand = quantized.codes * quantized.scale
    torch.testing.assert_close(y, F.linear(operand, codes.weights(), made.bias), rtol=1e-5, atol=1e-5)
    assert x.grad is not None and made.weight.grad is not None and made.bias.grad is not None
    torch.testing.assert_close(x.grad, grad @ codes.weights(), rtol=1e-5, atol=1e-5)
    expected = grad.flatten(0, 1).t() @ operand.flatten(0, 1)
    if masked:
        expected = expected * made.mask
        assert bool((codes.codes[~made.mask] == 0).all()) and bool((made.weight.grad[~made.mask] == 0).all())
    torch.testing.assert_close(made.weight.grad, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.bias.grad, grad.sum((0, 1)), rtol=1e-5, atol=1e-5)


def test_scales_come_after_the_product_in_a_fixed_order() -> None:
    made = layer(64, 6, weights=WeightQuantization(bits=4), activations=ActivationQuantization())
    x, codes = torch.randn(5, 64), made.codes()
    quantized = input_codes(x, ActivationQuantization())
    integers = (quantized.codes.to(torch.int32) @ codes.codes.to(torch.int32).t()).float()
    assert torch.equal(made(x), integers * quantized.scale * codes.scale.view(-1) + made.bias)


@pytest.mark.parametrize("product", ["native", "fake"])
@pytest.mark.parametrize("scale", ["tensor", "channel", "block"])
def test_native_and_fake_agree(product: Any, scale: Any) -> None:
    made = layer(128, 6, weights=WeightQuantization(bits=4, scale=scale), product=product)
    x = torch.randn(5, 128, requires_grad=True)
    y = made(x)
    torch.testing.assert_close(y, F.linear(x, made.codes().weights(), made.bias), rtol=1e-4, atol=1e-5)
    y.sum().backward()
    assert made.weight.grad is not None
    torch.testing.assert_close(made.weight.grad, x.detach().sum(0).expand(6, -1), rtol=1e-4, atol=1e-4)


def test_the_scale_gradient_reaches_the_largest_weight_alone() -> None:
    how = WeightQuantization(bits=4, scale_gradient=True)
    made, stopped = layer(16, 3, weights=how), layer(16, 3, weights=WeightQuantization(bits=4))
    x = torch.randn(7, 16)
    torch.testing.assert_close(made(x), stopped(x), rtol=1e-5, atol=1e-6)
    for one in (made, stopped):
        one(x).square().sum().backward()
    assert made.weight.grad is not None and stopped.weight.grad is not None
    differs = (made.weight.grad - stopped.weight.grad).abs() > 1e-4
    peaks = made.weight.abs() == made.weight.abs().amax(1, keepdim=True)
    assert bool((differs <= peaks).all()) and bool(differs.any())


def test_the_scale_gradient_of_asymmetric_weights() -> None:
    """A block's least and largest weights come back exactly, so their own sum has the gradient of themselves."""
    made = layer(8, 1, weights=WeightQuantization(bits=2, symmetric=False, scale_gradient=True))
    for place in (int(made.weight.argmin()), int(made.weight.argmax())):
        made.zero_grad()
        x = torch.zeros(1, 8)
        x[0, place] = 1
        made(x).sum().backward()
        assert made.weight.grad is not None
        torch.testing.assert_close(made.weight.grad, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (2, False)])
def test_clipped_weights_have_the_gradient_of_a_clip(bits: Any, symmetric: bool) -> None:
    """Through the scale alone, against a plain writing of round-straight-through, then clip (arXiv 2305.16619)."""
    how = WeightQuantization(bits=bits, symmetric=symmetric, clip="search", scale_gradient=True)
    made = layer(512, 2, weights=how)
    with torch.no_grad():
        made.weight.copy_(torch.randn(2, 512))  # clipping the longest tail pays
    found = made.codes()
    weight = made.weight.detach().clone().requires_grad_()
    least, most = (-how.largest if symmetric else -(2 ** (bits - 1))), how.largest
    low = weight.amin(1, keepdim=True)
    span = (
        weight.abs().amax(1, keepdim=True) / most
        if symmetric
        else (weight.amax(1, keepdim=True) - low) / (most - least)
    )
    share = (found.scale / span).detach()  # what the search chose
    scale = share * span
    zero_point = 0.0 if symmetric else least - share * low / scale
    steps = weight / scale + zero_point
    rounded = steps + (torch.floor(steps + 0.5) - steps).detach()
    values = scale * rounded.clamp(least, most) - scale * zero_point
    x, grad = torch.randn(5, 512), torch.randn(5, 2)
    F.linear(x, values).backward(grad)
    y = made(x)
    torch.testing.assert_close(y - made.bias, F.linear(x, values), rtol=1e-4, atol=1e-4)
    y.backward(grad)
    assert bool(((rounded < least) | (rounded > most)).any())
    torch.testing.assert_close(made.weight.grad, weight.grad, rtol=1e-4, atol=1e-3)


def test_a_straight_through_mask() -> None:
    """Zero forwards; backwards as if nothing were pruned, or not at all."""
    made = layer(8, 4, mask=Mask(keep=2, group=4))
    made.mask.copy_(find_mask(made.weight.detach().abs(), Mask(keep=2, group=4)))
    x, grad = torch.randn(5, 8), torch.randn(5, 4)
    for made.straight_through in (False, True):
        made.zero_grad()
        y = made(x)
        assert torch.equal(y, F.linear(x, made.weight * made.mask, made.bias))
        y.backward(grad)
        whole = grad.t() @ x
        expected = whole if made.straight_through else whole * made.mask
        torch.testing.assert_close(made.weight.grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inputs", [9, 10, 11])
def test_a_padded_group_keeps_what_there_is(inputs: int) -> None:
    mask = find_mask(torch.rand(6, inputs) + 0.1, Mask(keep=2, group=4, pad=True))
    assert mask.shape == (6, inputs)
    assert bool((mask[:, :8].view(6, 2, 4).sum(-1) == 2).all())
    assert bool((mask[:, 8:].sum(1) == min(2, inputs - 8)).all())


def test_whole_sums_do_not_overflow_float16() -> None:
    """Products of codes are 127 times those of the weights and more; float16 ends at 65504."""
    if not hasattr(torch, "get_autocast_dtype"):
        pytest.skip("this torch multiplies no float16 on processors")
    for bits in (8, 4):
        made = layer(768, 3, weights=WeightQuantization(bits=bits))  # type: ignore[arg-type]
        with torch.no_grad():
            made.weight.copy_(torch.randn(3, 768) * 0.05)
            x = 90 * made.weight[:1] / made.weight[0].norm()
            assert float((x @ made.codes().codes.t()).max()) > (65504 if bits == 8 else 0)
            torch.testing.assert_close(made(x.half()).float(), made(x), rtol=0.01, atol=0.1)


def test_nothing_to_do_is_an_ordinary_layer() -> None:
    x = torch.randn(4, 8)
    made = layer(8, 8)
    assert torch.equal(made(x), F.linear(x, made.weight, made.bias))
    everything = layer(8, 8, mask=Mask(keep=4, group=4), weights=WeightQuantization(bits=4))
    everything.mask.copy_(find_mask(everything.weight.abs(), Mask(keep=4, group=4)))
    assert bool(everything.mask.all())
    assert torch.equal(everything(x), layer(8, 8, weights=WeightQuantization(bits=4))(x))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(2, 5), st.data())
def test_exactly_n_of_every_m(outputs: int, groups: int, group: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, group))
    # Few different values, so that there are ties everywhere.
    scores = torch.tensor(data.draw(st.lists(
        st.integers(0, 2), min_size=outputs * groups * group, max_size=outputs * groups * group,
    )), dtype=torch.float32).view(outputs, -1)  # fmt: skip
    mask = find_mask(scores, Mask(keep=keep, group=group))
    parts = mask.view(outputs, groups, group)
    assert bool((parts.sum(-1) == keep).all())
    values = scores.view(outputs, groups, group)
    least = values.masked_fill(~parts, 9).amin(-1)
    most = values.masked_fill(parts, -9).amax(-1)
    assert bool((least >= most).all())


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([(1, 1), (8, 1), (2, 3)]),
    st.floats(0.05, 0.95),
    st.integers(0, 999),
)
def test_blocks_go_as_a_whole(rows: int, columns: int, block: Any, sparsity: float, seed: int) -> None:
    scores = torch.rand(rows * block[0], columns * block[1], generator=torch.Generator().manual_seed(seed))
    mask = find_mask(scores, Mask(sparsity=sparsity, block=block))
    parts = mask.view(rows, block[0], columns, block[1]).permute(0, 2, 1, 3).flatten(2)
    assert bool((parts.all(-1) | ~parts.any(-1)).all())
    assert int(parts.all(-1).sum()) == rows * columns - round(sparsity * rows * columns)


def test_sizes() -> None:
    """The published account: (4 x 0.5 + 1) / 32 of the weights is 9.375 %, scales and bias come on top."""
    made = layer(64, 10, weights=WeightQuantization(bits=4), mask=Mask(keep=2, group=4))
    made.mask.copy_(find_mask(made.weight.abs(), Mask(keep=2, group=4)))
    assert size_in_bits(made) == 0.09375 * 32 * 640 + 32 * 10 + 32 * 10
    assert size_in_bits(torch.nn.Linear(64, 10)) == 32 * 650
    assert (
        size_in_bits(layer(64, 10, weights=WeightQuantization(bits=2, symmetric=False, scale="block")))
        == 2 * 640 + 32 * 30
    )


def test_autocast_keeps_the_codes() -> None:
    made = layer(32, 4, weights=WeightQuantization(bits=4))
    x = torch.randn(3, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = made(x)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
    torch.testing.assert_close(y.float(), made(x), rtol=0.03, atol=0.03)
    assert made.weight.grad is not None and made.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: WeightQuantization(bits=4, symmetric=False), "asymmetric weights are for 2 bits"),
        (lambda: WeightQuantization(bits=2, symmetric=False, bound="edge"), "leave out bound=edge"),
        (lambda: from_dict(WeightQuantization, {"bits": 3}, "here"), "Input should be 2, 4 or 8"),
        (lambda: Compression(weights=WeightQuantization(bits=2, symmetric=False), mask=Mask(keep=2, group=4)), "no exact zero"),
        (lambda: Compression(activations=ActivationQuantization()), "need symmetric integer weights"),
        (lambda: Mask(keep=5, group=4), "cannot keep 5 of 4"),
        (lambda: Mask(keep=2), "give either keep and group"),
        (lambda: ActivationQuantization(scale="onnx"), "rounding=half_even"),
    ],
)  # fmt: skip
def test_contradictions(make: Any, complaint: str) -> None:
    with pytest.raises((ValidationError, UserError), match=complaint):
        make()


def test_shapes_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="does not divide 10"):
        weight_codes(torch.ones(2, 10), WeightQuantization(scale="block", block_size=4))
    with pytest.raises(ValueError, match="do not divide 10"):
        find_mask(torch.ones(2, 10), Mask(keep=2, group=4))
    with pytest.raises(ValueError, match="do not divide"):
        find_mask(torch.ones(2, 10), Mask(sparsity=0.5, block=(8, 1)))
