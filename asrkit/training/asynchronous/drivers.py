"""The driver that a stage's settings ask for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from asrkit.errors import UserError
from asrkit.training.asynchronous.config import AsyncConfig
from asrkit.training.asynchronous.ray_driver import RayDriver
from asrkit.training.asynchronous.schedule import pushes_per_step
from asrkit.training.delay import Delay
from asrkit.training.session import SERIAL, Driver, Here


def make_driver(settings: AsyncConfig, manifests: Sequence[Path]) -> Driver:
    """The driver for a stage's settings and the manifests it was given; several are the replicas' own.

    Raises:
        UserError: settings that contradict each other; Ray is not installed, or the machine has too few processors or GPUs.
    """
    workers = settings.workers or len(manifests)
    name = settings.driver
    if name == "auto":
        name = "ray" if workers > 1 or settings.ray_address is not None else "serial"
    _check(settings, name, workers, len(manifests))
    if name == "serial":
        return SERIAL
    if name == "simulated":
        delay = Delay(settings.staleness, settings.fetch_every)
        return Here(delay, pushes_per_step(workers, settings.staleness), own_data=True)
    return RayDriver.checked(settings, workers)


def _check(settings: AsyncConfig, name: str, workers: int, manifests: int) -> None:
    findings = []
    if manifests > 1 and workers != manifests:
        findings.append(
            f"{manifests} manifests are the data of as many replicas, but there are {workers} workers; leave --workers out"
        )
    if name == "serial" and workers > 1:
        findings.append(f"{workers} workers need asynchronous.driver=ray or simulated")
    if name != "simulated" and settings.staleness:
        findings.append("asynchronous.staleness is for asynchronous.driver=simulated; for ray it is max_staleness")
    if name == "serial" and settings.fetch_every != AsyncConfig().fetch_every:
        findings.append("asynchronous.fetch_every is for several workers; leave it out")
    if name != "ray":
        plain = AsyncConfig()
        names = ("max_staleness", "shards", "threads", "gpus_per_worker", "ray_address", "sites")
        changed = [key for key in names if getattr(settings, key) != getattr(plain, key)]
        findings += [f"asynchronous.{key} is for asynchronous.driver=ray, but the driver is {name}" for key in changed]
    if settings.sites and len(settings.sites) != manifests:
        findings.append(
            f"asynchronous.sites names {len(settings.sites)} resources for {manifests} manifests; give one for each, in their order"
        )
    if findings:
        raise UserError.of(findings)
