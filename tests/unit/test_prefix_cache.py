"""Pages and the tree over them: who is evicted when, what is locked, what is pinned, what is not counted twice."""

from __future__ import annotations

import pytest

from multimodal_gen.llm.pages import PagePool
from multimodal_gen.llm.prefix_cache import Node, PrefixCache

pytestmark = [pytest.mark.unit]

BASE = (None, "")


class Tree:
    """A tree over pages of two tokens."""

    def __init__(self, pages: int = 8, **settings: object) -> None:
        self.pool = PagePool(pages)
        self.cache = PrefixCache(self.pool, 2, **settings)

    def put(self, *tokens: int, owner: tuple[str | None, str] = BASE) -> list[Node]:
        """A sequence computes these; it goes on using them."""
        path = self.cache.match(owner, tokens, len(tokens) // 2)
        for at in range(2 * len(path), len(tokens) - 1, 2):
            path.append(self.cache.add(owner, path, tokens[at : at + 2], self.pool.take()))
        return path

    def keep(self, *tokens: int) -> list[Node]:
        """The same, and it ends."""
        path = self.put(*tokens)
        self.cache.unlock(BASE, path)
        return path

    def has(self, *tokens: int) -> int:
        """Tokens of these that are there."""
        return 2 * self.cache.measure(BASE, tokens, 100)


def test_a_page_is_released_once_and_shared_only_in_use():
    pool = PagePool(1)
    page = pool.take()
    pool.share(page)
    pool.release(page)
    assert (pool.free, pool.used) == (0, 1)
    pool.release(page)
    for misuse in (lambda: pool.release(page), lambda: pool.share(page)):
        with pytest.raises(AssertionError):
            misuse()
    pool.take()
    with pytest.raises(AssertionError):
        pool.take()


def test_what_begins_alike_shares_pages():
    tree = Tree()
    tree.keep(1, 1, 2, 2, 3, 3)
    tree.keep(1, 1, 2, 2, 4, 4)
    assert tree.pool.used == 4
    assert tree.has(1, 1, 2, 2, 9, 9) == 4
    assert tree.has(1, 9, 2, 2) == 0
    assert tree.cache.measure(("other", ""), (1, 1), 9) == 0


def test_the_leaf_that_was_used_longest_ago_goes_first():
    tree = Tree()
    tree.keep(1, 1, 2, 2)
    tree.keep(3, 3)
    tree.keep(1, 1, 4, 4)  # the first page is used again, its other branch is not
    assert tree.cache.evict(1) == 1
    assert tree.has(1, 1, 2, 2) == 2
    assert tree.cache.evict(1) == 1
    assert tree.has(3, 3) == 0
    assert tree.has(1, 1, 4, 4) == 4
    assert tree.cache.evict(9) == 2
    assert tree.pool.used == 0


def test_what_is_used_is_never_evicted():
    tree = Tree()
    path = tree.put(1, 1, 2, 2)
    tree.keep(1, 1, 2, 2, 3, 3)
    assert tree.cache.evictable == 1
    assert tree.cache.evict(9) == 1
    assert tree.has(1, 1, 2, 2) == 4
    tree.cache.unlock(BASE, path)
    assert tree.cache.evict(9) == 2


def test_two_that_compute_the_same_end_up_with_one_page():
    tree = Tree()
    first = [tree.cache.add(BASE, [], (1, 1), tree.pool.take())]
    second = [tree.cache.add(BASE, [], (1, 1), tree.pool.take())]
    assert first == second
    assert tree.pool.used == 1
    tree.cache.unlock(BASE, first)
    assert tree.cache.evict(9) == 0
    tree.cache.unlock(BASE, second)
    assert tree.cache.evict(9) == 1


def test_pins_stay_until_they_are_taken_away():
    tree = Tree(max_pinned=2)
    path = tree.put(1, 1, 2, 2, 3, 3)
    tree.cache.pin(path)  # more than may be pinned
    assert tree.cache.pinned == 0
    tree.cache.pin(path[:2])
    tree.cache.pin(path[:2])
    assert tree.cache.pinned == 2
    tree.cache.unlock(BASE, path)
    assert tree.cache.evict(9) == 1
    tree.cache.unpin_all()
    assert tree.cache.evictable == 2
    assert tree.cache.evict(9) == 2


def test_what_is_spoilt_is_forgotten_but_for_what_others_use():
    tree = Tree()
    other = tree.put(1, 1)
    tree.cache.forget(BASE, tree.put(1, 1, 2, 2, 3, 3))
    assert tree.has(1, 1, 2, 2) == 2
    tree.cache.forget(BASE, other)
    assert tree.pool.used == 0
    assert tree.cache.evictable == 0


def test_pages_that_are_not_kept_go_with_their_last_user():
    tree = Tree(keep=False)
    first, second = tree.put(1, 1, 2, 2), tree.put(1, 1, 3, 3)
    assert tree.pool.used == 3
    tree.cache.unlock(BASE, first)
    assert tree.pool.used == 2
    tree.cache.unlock(BASE, second)
    assert tree.pool.used == 0


def test_a_thousand_uses_of_one_prefix_leave_a_short_heap():
    tree = Tree()
    for _ in range(1000):
        tree.keep(1, 1, 2, 2)
    assert len(tree.cache._heap) < 200
    assert tree.cache.evict(9) == 2
