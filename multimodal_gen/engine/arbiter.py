"""Whose step is next, where pictures and text share one engine. Pure: no clocks, no torch.

A step cannot be interrupted, and a denoising step may take as long as a hundred tokens. Text therefore saves up: each
of its steps that takes less than the budget for a token leaves the rest of it to pictures, and a denoising step runs
once what it will take has been saved. A piece of decoding needs as much saved, and takes only its own time. Over any
stretch of time a token then takes the budget at most on average, and pictures get all that text can spare. Where text
can spare nothing, because its own steps are longer than the budget, pictures still get a share of the time: after
`PATIENCE` times what their own step takes. While text is written, a denoising step has as many rows as a budget has
time for, at least one.

Everything is a function of what `ran` was told, so that all ranks decide alike.
"""

from __future__ import annotations

from multimodal_gen.adapters import Side

PATIENCE = 4.0  # so pictures have a fifth of the time at least
SMOOTHING = 0.3  # weight of the latest step in what the next one is expected to take


class Arbiter:
    """Chooses between two sides of which either may have nothing to do."""

    def __init__(self, budget_s: float) -> None:
        """`budget_s`: what a token of text may take on average."""
        self.budget_s = budget_s
        self._expected_s = 0.0  # of the next denoising step; 0: not known yet
        self._saved_s = 0.0  # that text has left to pictures; less than nothing where they took more
        # Of text steps while pictures had work, since their last step, less what their pieces have had.
        self._waited_s = 0.0
        self._token_s = 0.0  # of a denoising step, for one token of the transformer; 0: not known yet

    def choose(self, *, pictures: bool, text: bool) -> Side | None:
        """The side whose step is next, of those that have work; None where neither has."""
        if not text:
            self._saved_s = 0.0  # nobody waits for a token: the next one to come must not pay for that
        if not pictures:
            self._waited_s = 0.0
        if pictures and text:
            return "pictures" if self._pictures_are_due() else "text"
        return "pictures" if pictures else "text" if text else None

    def _pictures_are_due(self) -> bool:
        if self._waited_s == 0.0:  # a step of text at least comes between two of pictures that nothing was saved for
            return self._saved_s > 0.0 and self._saved_s >= self._expected_s
        return self._saved_s >= self._expected_s or self._waited_s >= PATIENCE * self._expected_s

    def most_tokens(self, *, text: bool) -> int | None:
        """How large a denoising step may be, so that no text waits longer than a budget; a row is always whole."""
        return max(1, int(self.budget_s / self._token_s)) if text and self._token_s else None

    def ran(
        self, side: Side, seconds: float, *, pictures: bool, text: bool, tokens: int = 0, piece: bool = False
    ) -> None:
        """A step is over.

        Args:
            pictures, text: who had work when it was chosen.
            tokens: of a denoising step.
            piece: of decoding, which says nothing of the next denoising step.
        """
        if side == "pictures" and piece:
            self._waited_s = max(0.0, self._waited_s - PATIENCE * seconds)
        elif side == "pictures":
            self._expected_s = _mean(self._expected_s, seconds)
            self._token_s = _mean(self._token_s, seconds / tokens) if tokens else self._token_s
            self._waited_s = 0.0
        if not (pictures and text):
            return
        if side == "pictures":
            self._saved_s -= seconds
        else:
            self._saved_s += self.budget_s - seconds
            self._waited_s += seconds
        # A hiccup is not paid for, nor saved from, for ever.
        most = self.budget_s + self._expected_s
        self._saved_s = min(most, max(-most, self._saved_s))


def _mean(before: float, latest: float) -> float:
    """A moving one, which begins with the first value."""
    return (1 - SMOOTHING) * before + SMOOTHING * latest if before else latest
