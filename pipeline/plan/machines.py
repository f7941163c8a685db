"""Machine types by their names: what Dataflow charges a worker for."""

import math
from dataclasses import dataclass

from pipeline.errors import EvenmixError
from pipeline.machine_types import vcpus_and_memory_gb
from pipeline.plan.figures import Prices
from pipeline.plan.ranges import Range

_L4_OF_G2 = {
    f"g2-standard-{vcpus}": gpus
    for vcpus, gpus in {4: 1, 8: 1, 12: 1, 16: 1, 24: 2, 32: 1, 48: 4, 96: 8}.items()
}
"""GPUs of these machines, which come in no other kind (cloud.google.com/compute/docs/gpus)."""


@dataclass(frozen=True)
class Machine:
    """A worker's machine; ``workers`` is the most of them that a job may have.

    It has one process a vCPU, and with GPUs only one, which works at ``threads`` items at a time.
    """

    machine_type: str
    vcpus: int
    memory_gb: float
    gpus: int
    disk_gb: int
    workers: int
    threads: int

    @property
    def slots(self) -> int:
        """How many items it works at."""
        return self.threads * (1 if self.gpus else self.vcpus)

    def used_by(self, items: int) -> int:
        """Return how many machines a job of so many items uses: each has an item at least."""
        return min(self.workers, math.ceil(items / self.slots))

    def hourly(self, prices: Prices) -> Range:
        """Return what an hour of it costs, in dollars."""
        return (
            prices.vcpu_hour.range * self.vcpus
            + prices.memory_gb_hour.range * self.memory_gb
            + prices.l4_hour.range * self.gpus
            + prices.disk_gb_hour.range * self.disk_gb
        )


def machine_of(machine_type: str, disk_gb: int, workers: int, threads: int) -> Machine:
    """Return the machine of a type such as ``n2-highmem-8``.

    Raises:
        EvenmixError: the name does not tell what the machine has.
    """
    size = vcpus_and_memory_gb(machine_type)
    if size is None or (machine_type.startswith("g2-") and machine_type not in _L4_OF_G2):
        raise EvenmixError(
            f"the plan cannot price the machine type {machine_type!r}; it knows n1, n2, n2d, e2 "
            "and c3 (standard, highmem, highcpu) and g2-standard, such as n2-standard-4"
        )
    vcpus, memory_gb = size
    gpus = _L4_OF_G2.get(machine_type, 0)
    return Machine(machine_type, vcpus, memory_gb, gpus, disk_gb, workers, threads)
