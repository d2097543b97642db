"""One optimizer step's documents cut into micro-batches as a test wants them."""

from dataclasses import dataclass

from rlpost.packing import Packer


@dataclass(frozen=True, slots=True)
class Parts(Packer):
    """Micro-batches of `size` documents in their order, one a row, or all of them in one row."""

    size: int = 1
    packed: bool = False

    def micros(self, documents):
        parts = [documents[start : start + self.size] for start in range(0, len(documents), self.size)]
        return [self.micro([part] if self.packed else [[one] for one in part]) for part in parts]
