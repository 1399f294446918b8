"""Options of a dry run, which no YAML file has and no run keeps."""

import re
from dataclasses import dataclass

from mpl_fast.config.fields import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

SPLITS = ("labeled", "unlabeled", "val", "classes")


@dataclass(frozen=True, kw_only=True)
class DryRunConfig:
    """Only with --dry-run: machines and data that are not here."""

    card: str = ""
    """A GPU of `CARDS`, given as --device; empty: the run's device."""
    ranks: NonNegativeInt = 0
    """GPUs over all nodes; 0: as many as processes were started."""
    nodes: PositiveInt = 1
    """Machines that share the ranks."""
    network_gbps: PositiveFloat = 400.0
    """Gb/s from one node to the others, over all its network cards."""
    price_per_gpu_hour: NonNegativeFloat = 0.0
    """Price of a GPU for an hour, in any currency; 0: no price is printed."""
    records: str = ""
    """Numbers of images and classes in place of those in data.root, such as
    labeled=4000,unlabeled=46000,val=10000,classes=10."""

    @property
    def counts(self) -> dict[str, int]:
        """The numbers of `records` by name; empty if there are none."""
        return {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", self.records)}

    def problems(self) -> list[str]:
        """What is wrong among them, a line that begins with its key."""
        found = []
        if self.nodes > 1 and (not self.ranks or self.ranks % self.nodes):
            unequal = f"cannot share {self.ranks} ranks equally" if self.ranks else "needs ranks"
            found.append(f"nodes {self.nodes} {unequal}: set ranks to a multiple of {self.nodes}")
        names = re.sub(r"=0*[1-9]\d*(?=,|$)", "", self.records).split(",")
        if self.records and sorted(names) != sorted(SPLITS):
            form = ",".join(f"{name}=N" for name in SPLITS)
            found.append(f"records must be {form} with numbers above 0, not {self.records}")
        return found
