"""Several documents in one model, each of which can be added, replaced, scaled and removed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from d2l.internalize import Internalizer
from hyperlora import lora as lora_lib
from hyperlora.errors import UserError
from hyperlora.lora import Lora


class Memory:
    """Documents by name, each a slot of ranks; together they are one LoRA.

    Attributes:
      internalizer: reads documents.
      documents: name -> its LoRA without what all documents share, in the order of adding.
      scales: name -> factor of its delta.
    """

    def __init__(self, internalizer: Internalizer):
        self.internalizer = internalizer
        self.documents: dict[str, Lora] = {}
        self.scales: dict[str, float] = {}

    def add(
        self,
        name: str,
        document: Sequence[int],
        scale: float = 1.0,
        report: Callable[[float], None] = lambda done: None,
    ) -> None:
        """Internalises a document; one of the same name is replaced, in its place.

        Args:
          document: tokens of the context encoder.
          report: see `Internalizer.chunks`.

        Raises:
          UserError: the document is empty; what was there is kept.
        """
        self.documents[name] = self.internalizer.chunks(document, report)
        self.scales[name] = scale

    def remove(self, name: str) -> None:
        """Forgets a document, exactly.

        Raises:
          UserError: there is none of that name.
        """
        self._check(name)
        del self.documents[name], self.scales[name]

    def scale(self, name: str, factor: float) -> None:
        """Sets how strongly a document counts; 0 switches it off.

        Raises:
          UserError: there is none of that name.
        """
        self._check(name)
        self.scales[name] = factor

    def lora(self) -> Lora | None:
        """The LoRA of all documents that count, one row; None, the base model, if none does."""
        parts = [
            lora_lib.scale(own, self.scales[name])
            for name, own in self.documents.items()
            if self.scales[name]
        ]
        return self.internalizer.with_shared(*parts) if parts else None

    def _check(self, name: str) -> None:
        if name not in self.documents:
            known = ', '.join(self.documents) or 'none'
            raise UserError(f'there is no document {name!r}; there are: {known}')
