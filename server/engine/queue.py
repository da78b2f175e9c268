"""Requests in the order in which they are served."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, MutableMapping
from operator import attrgetter

from server.engine.request import Request

RANK = attrgetter("rank")


class Queue(MutableMapping[str, Request]):
    """Requests by id; `order` has them by rank, which changes through rerank() alone."""

    def __init__(self) -> None:
        self.order: list[Request] = []
        self._by_id: dict[str, Request] = {}

    def __getitem__(self, id: str) -> Request:
        return self._by_id[id]

    def __setitem__(self, id: str, request: Request) -> None:
        assert id not in self._by_id, f"{id} is here already"
        self._by_id[id] = request
        insort(self.order, request, key=RANK)

    def __delitem__(self, id: str) -> None:
        request = self._by_id.pop(id)
        del self.order[bisect_left(self.order, request.rank, key=RANK)]

    def __contains__(self, id: object) -> bool:
        return id in self._by_id

    def __iter__(self) -> Iterator[str]:
        return (request.id for request in self.order)

    def __len__(self) -> int:
        return len(self.order)

    def rerank(self, request: Request, urgency: int) -> None:
        """Give one of these another urgency; among its equals it stays as old as it is."""
        del self[request.id]
        request.rank = (urgency, request.rank[1])
        self[request.id] = request
