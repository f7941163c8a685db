"""What the names of Google's machine types say, such as n2-highmem-8.

Source: cloud.google.com/compute/docs/machine-resource.
"""

_EVEN = {"standard": 4.0, "highmem": 8.0, "highcpu": 1.0}
_GB_PER_VCPU = {
    "n1": {"standard": 3.75, "highmem": 6.5, "highcpu": 0.9},
    "n2": _EVEN,
    "n2d": _EVEN,
    "e2": _EVEN,
    "c3": {"standard": 4.0, "highmem": 8.0, "highcpu": 2.0},
    "g2": {"standard": 4.0},
}


def vcpus_and_memory_gb(machine_type: str) -> tuple[int, float] | None:
    """Return how many vCPUs and how much memory machines of a type have; None if unknown."""
    family, _, kind_and_vcpus = machine_type.partition("-")
    kind, _, vcpus = kind_and_vcpus.partition("-")
    per_vcpu = _GB_PER_VCPU.get(family, {}).get(kind)
    if per_vcpu is None or not vcpus.isdecimal():
        return None
    return int(vcpus), per_vcpu * int(vcpus)
