"""Keys and values that sequences share: a tree over whole pages (RadixAttention: Zheng et al., 2024). No torch.

A node is one page, named by the tokens in it; its ancestors are the pages before. So a path from a root is a prefix,
and equal prefixes are the same pages. A root belongs to one adapter, because an adapter changes keys and values.

The tree has one reference on each of its pages, and every sequence that uses the page one more: a page with a single
reference is unlocked. Who uses a page uses the pages before it, too, so below an unlocked page all are unlocked, and
every unlocked page can be had by evicting leaves. Pinned pages stay, whether locked or not.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from multimodal_gen.llm.pages import PagePool

Tokens = tuple[int, ...]
STALE_ENTRIES = 64  # of the heap, beyond twice the tree's size, before it is made anew


@dataclass(eq=False)
class Node:
    """One page of keys and values."""

    tokens: Tokens  # in the page: exactly a page's worth; a root has none
    page: int  # of the pool; a root has none: -1
    parent: Node | None  # None: a root, or no longer in the tree
    children: dict[Tokens, Node] = field(default_factory=dict)
    used: int = 0  # when it was let go of last, by the tree's own count
    pinned: bool = False


Owner = tuple[str | None, str]  # (adapter's digest, whose tree it is: "" where all share)


class PrefixCache:
    """The tree. What is found or added is locked for the caller, until it is unlocked."""

    def __init__(self, pool: PagePool, page_size: int, *, keep: bool = True, max_pinned: int | None = None) -> None:
        """
        Args:
            keep: leave pages in the tree when nobody uses them any more; else they are freed then.
            max_pinned: pages that may be pinned; None: a quarter.
        """
        self.page_size, self.keep = page_size, keep
        self.max_pinned = pool.pages // 4 if max_pinned is None else max_pinned
        self.nodes = 0
        self.locked = 0  # nodes that sequences use
        self.pinned = 0
        self.evictable = 0  # nodes that are neither locked nor pinned
        self.evictions = 0  # pages, since the start
        self._pool = pool
        self._roots: dict[Owner, Node] = {}
        self._heap: list[tuple[int, int, Node]] = []  # (used, serial, leaf); an entry may be out of date
        self._ticks = 0
        self._serial = 0

    @property
    def unlocked(self) -> int:
        """Pages that only the tree uses."""
        return self.nodes - self.locked

    def match(self, owner: Owner, tokens: Sequence[int], pages: int) -> list[Node]:
        """The longest path that begins as `tokens` do, at most `pages` long; locked."""
        path = self._walk(owner, tokens, pages)
        for node in path:
            self._lock(node)
        return path

    def measure(self, owner: Owner, tokens: Sequence[int], pages: int) -> int:
        """How long that path is, in pages; nothing is locked."""
        return len(self._walk(owner, tokens, pages))

    def _walk(self, owner: Owner, tokens: Sequence[int], pages: int) -> list[Node]:
        node, size, path = self._roots.get(owner), self.page_size, list[Node]()
        while node is not None and len(path) < pages:
            start = len(path) * size
            node = node.children.get(tuple(tokens[start : start + size]))
            if node is not None:
                path.append(node)
        return path

    def add(self, owner: Owner, path: Sequence[Node], tokens: Tokens, page: int) -> Node:
        """Put a page of the caller behind a path that it has locked; the node is locked by the caller's reference.

        Where the tree has these tokens already, the caller gets that node instead, and its page is freed.
        """
        assert len(tokens) == self.page_size, f"{len(tokens)} tokens are no page of {self.page_size}"
        parent = path[-1] if path else self._roots.setdefault(owner, Node((), -1, None))
        node = parent.children.get(tokens)
        if node is not None:
            self._lock(node)
            self._pool.release(page)
            return node
        node = parent.children[tokens] = Node(tokens, page, parent)
        self._pool.share(page)
        self.nodes += 1
        self.locked += 1
        return node

    def pin(self, path: Sequence[Node]) -> None:
        """Keep these pages for good; beyond the limit nothing is pinned. They are locked by the caller."""
        fresh = [node for node in path if not node.pinned]
        if not self.keep or self.pinned + len(fresh) > self.max_pinned:
            return
        for node in fresh:
            node.pinned = True
        self.pinned += len(fresh)

    def unlock(self, owner: Owner, path: Sequence[Node]) -> None:
        """Let go of a path that `match` or `add` gave."""
        self._ticks += 1
        for node in reversed(path):
            self._pool.release(node.page)
            node.used = self._ticks
            if self._pool.references(node.page) > 1:
                continue
            self.locked -= 1
            if not self.keep:
                self._remove(node)
            elif not node.pinned:
                self.evictable += 1
                self._offer(node)
        self._drop_empty(owner)

    def forget(self, owner: Owner, path: Sequence[Node]) -> None:
        """Let go of a path whose keys and values are no good, and of as much of it as nobody else uses."""
        self.unlock(owner, path)
        for node in reversed(path):
            if node.parent is not None and not node.children and self._pool.references(node.page) == 1:
                self._unpin(node)
                self.evictable -= 1
                self._remove(node)
        self._drop_empty(owner)

    def evict(self, pages: int) -> int:
        """Free up to so many pages, those first that were let go of longest ago; returns how many."""
        freed = 0
        while freed < pages and self._heap:
            used, _, node = heapq.heappop(self._heap)
            if node.used != used or not self._is_free_leaf(node):
                continue
            parent = node.parent
            self.evictable -= 1
            self._remove(node)
            freed += 1
            if parent is not None and self._is_free_leaf(parent):
                self._offer(parent)
        self.evictions += freed
        self._roots = {owner: root for owner, root in self._roots.items() if root.children}
        return freed

    def unpin_all(self) -> None:
        """What was pinned is kept like everything else from now on."""
        for root in self._roots.values():
            for node in _below(root):
                self._unpin(node)

    def clear(self) -> None:
        """Empty the tree; nothing of it is locked."""
        self.unpin_all()
        self.evict(self.nodes)
        assert not self.nodes, "a sequence still uses pages of the tree"

    # --- the tree ---------------------------------------------------------------------------------------------------

    def _lock(self, node: Node) -> None:
        if self._pool.references(node.page) == 1:
            self.locked += 1
            self.evictable -= not node.pinned
        self._pool.share(node.page)

    def _is_free_leaf(self, node: Node) -> bool:
        inside = node.parent is not None
        return inside and not node.children and not node.pinned and self._pool.references(node.page) == 1

    def _offer(self, node: Node) -> None:
        """A leaf may have become evictable; a node with children is offered when it has lost them."""
        if node.children:
            return
        if len(self._heap) > 2 * self.nodes + STALE_ENTRIES:
            self._heap = [entry for entry in self._heap if entry[2].used == entry[0] and self._is_free_leaf(entry[2])]
            heapq.heapify(self._heap)
        self._serial += 1
        heapq.heappush(self._heap, (node.used, self._serial, node))

    def _unpin(self, node: Node) -> None:
        if not node.pinned:
            return
        node.pinned = False
        self.pinned -= 1
        if self._pool.references(node.page) == 1:
            self.evictable += 1
            self._offer(node)

    def _remove(self, node: Node) -> None:
        assert node.parent is not None, "a root is no page"
        assert not node.children, "pages go from the end of a prefix"
        del node.parent.children[node.tokens]
        node.parent = None
        self._pool.release(node.page)
        self.nodes -= 1

    def _drop_empty(self, owner: Owner) -> None:
        root = self._roots.get(owner)
        if root is not None and not root.children:
            del self._roots[owner]


def _below(root: Node) -> list[Node]:
    """All nodes under a root, parents first."""
    found = list(root.children.values())
    for node in found:
        found += node.children.values()
    return found
