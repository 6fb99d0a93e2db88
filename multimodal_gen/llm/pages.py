"""Which pages of the KV cache are free, and by how many the others are used. No torch: numbers only."""

from __future__ import annotations


class PagePool:
    """A free list with reference counts. Whoever takes a page, or shares one, releases it once."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free = list(range(pages - 1, -1, -1))  # a stack: the page freed last is the one that caches still hold
        self._references = [0] * pages

    @property
    def free(self) -> int:
        """Pages that nobody uses."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Pages that somebody uses."""
        return self.pages - len(self._free)

    def references(self, page: int) -> int:
        """By how many a page is used."""
        return self._references[page]

    def take(self) -> int:
        """A free page, used once from now on."""
        assert self._free, "the caller makes room first"
        page = self._free.pop()
        assert self._references[page] == 0, f"page {page} is on the free list and in use"
        self._references[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more uses the page."""
        assert self._references[page] > 0, f"page {page} is free: nobody can share it"
        self._references[page] += 1

    def release(self, page: int) -> None:
        """One fewer uses the page; it is free when nobody does."""
        assert self._references[page] > 0, f"page {page} is released twice"
        self._references[page] -= 1
        if self._references[page] == 0:
            self._free.append(page)
