"""Settings of the drivers with several replicas."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from asrkit.config import Advanced, NonNegative, Positive, config


@config
class AsyncConfig:
    """Who computes gradients, and from how old weights. A stage's settings have it as ``asynchronous``."""

    driver: Literal["auto", "serial", "simulated", "ray"] = "auto"
    """serial: this process (or torchrun's); ray: replicas in processes of their own, by Ray; simulated: as if there were replicas, in this process and
    reproducible; auto: ray if there are several workers or manifests, or a ray_address, else serial."""
    workers: Positive | None = None
    """Replicas that compute gradients; null is one for each manifest."""
    max_staleness: Annotated[int, Field(ge=0)] = 4
    """ray: at most this many updates may be made between a replica's fetching weights and the use of its gradients. 0 is a barrier: the gradients of all
    replicas are averaged, as in data-parallel training. Raise it if replicas wait for each other, lower it if the loss is unsteady."""
    staleness: Annotated[int, Field(ge=0)] = 0
    """simulated: every update uses the gradients of the weights exactly this many updates before; 0 is a barrier."""
    fetch_every: Positive = 1
    """Pushes of a replica between two fetches of the weights; it fetches earlier if its weights become too old. How often it pushes, in batches, is
    training.accumulate."""
    shards: Positive = 1
    """ray: server processes that share the parameters and the optimizer; 1 is the process that was started, without others. Raise it if one machine's
    network cannot carry the weights of all replicas."""
    threads: Positive = 1
    """ray: threads of each replica on a CPU."""
    gpus_per_worker: NonNegative = 0.0
    """ray: GPUs of each replica, such as 1, or 0.5 if two share one; 0 computes on the CPU."""
    ray_address: str | None = None
    """ray: address of a running Ray cluster, such as auto or 10.0.0.5:6379; null starts Ray on this machine, reachable from this machine alone."""
    sites: Advanced[tuple[str, ...]] = ()
    """ray, with several manifests: a resource of the cluster for each manifest's replica, which runs on a machine that has it (ray start --resources)."""
