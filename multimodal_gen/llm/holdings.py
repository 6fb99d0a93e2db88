"""Who holds which pages of the KV cache: sequences get room here, share prefixes, and give all of it back. No torch."""

from __future__ import annotations

from multimodal_gen.llm.pages import PagePool
from multimodal_gen.llm.prefix_cache import Owner, PrefixCache
from multimodal_gen.llm.sequence import Sequence
from multimodal_gen.text import TextRequest


class Holdings:
    """A pool of pages and the tree over them."""

    def __init__(self, pages: int, page_size: int, *, prefix_cache: bool = True) -> None:
        """`prefix_cache`: requests share what begins alike, also after its end; else only the choices of one do."""
        self.page_size = page_size
        self.pool = PagePool(pages)
        self.tree = PrefixCache(self.pool, page_size, keep=prefix_cache)

    @property
    def room(self) -> int:
        """Pages that can be had now."""
        return self.pool.free + self.tree.evictable

    @property
    def tokens(self) -> int:
        """Tokens that all pages hold: no sequence can be longer."""
        return self.pool.pages * self.page_size

    def pages_for(self, tokens: int) -> int:
        """Pages that so many tokens take."""
        return -(-tokens // self.page_size)

    def owner(self, request: TextRequest) -> Owner:
        """In which tree the request's pages are."""
        return request.adapter, "" if self.tree.keep else request.id

    def measure(self, request: TextRequest) -> int:
        """Tokens of the prompt that are in the tree."""
        usable = 0 if request.prompt_logprobs else (len(request.prompt) - 1) // self.page_size
        return self.tree.measure(self.owner(request), request.prompt, usable) * self.page_size

    def open(self, sequence: Sequence) -> None:
        """Give a sequence that has nothing the pages that the tree has of it; one token at least stays to be read."""
        assert not sequence.pages, "the sequence has pages already"
        request = sequence.request
        reads_all = request.prompt_logprobs and sequence.index == 0 and not sequence.generated
        usable = 0 if reads_all else (len(sequence.tokens) - 1) // self.page_size
        sequence.path = self.tree.match(sequence.owner, sequence.tokens, usable)
        sequence.pages = [node.page for node in sequence.path]
        sequence.computed = len(sequence.path) * self.page_size

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Have pages for so many of its tokens, evicting others; False, and nothing, where there is no room."""
        missing = self.pages_for(tokens) - len(sequence.pages)
        if missing <= 0:
            return True
        if missing > self.room:
            return False
        self.tree.evict(missing - self.pool.free)
        sequence.pages += [self.pool.take() for _ in range(missing)]
        return True

    def commit(self, sequence: Sequence, tokens: int) -> None:
        """So many of its tokens are computed now: pages that are full go into the tree."""
        sequence.computed, size = tokens, self.page_size
        while (len(sequence.path) + 1) * size <= tokens:
            at = len(sequence.path)
            page = tuple(sequence.tokens[at * size : (at + 1) * size])
            node = self.tree.add(sequence.owner, sequence.path, page, sequence.pages[at])
            sequence.pages[at] = node.page
            sequence.path.append(node)

    def pin(self, sequence: Sequence) -> None:
        """Keep the start of the prompt for good, as its request asks."""
        self.tree.pin(sequence.path[: sequence.request.keep_prefix // self.page_size])

    def close(self, sequence: Sequence, *, spoilt: bool = False) -> None:
        """Take all pages back; `spoilt`: what is in them is no good to anybody."""
        leave = self.tree.forget if spoilt else self.tree.unlock
        own = sequence.pages[len(sequence.path) :]
        leave(sequence.owner, sequence.path)
        for page in own:
            self.pool.release(page)
        sequence.path, sequence.pages, sequence.computed = [], [], 0
