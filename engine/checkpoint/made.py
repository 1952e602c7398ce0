"""Files of a model that lie nowhere: each is made when it is first read, so that who looks at headers pays for none."""

from collections.abc import Callable, Iterator, Mapping


class MadeFiles(Mapping[str, bytes]):
    """Files by name, and the ids of the tokens that they tell of, which are known without making one."""

    def __init__(
        self, makers: Mapping[str, Callable[[], bytes]], list_vocabulary: Callable[[], Mapping[str, int]]
    ) -> None:
        self._makers = makers
        self._made: dict[str, bytes] = {}
        self.list_vocabulary = list_vocabulary

    def __getitem__(self, name: str) -> bytes:
        """Make it, once; `KeyError` for a file that there is not."""
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        """Whether there is such a file."""
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        """Their names."""
        return iter(self._makers)

    def __len__(self) -> int:
        """How many."""
        return len(self._makers)
