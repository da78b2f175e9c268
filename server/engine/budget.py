"""Budget: how many tokens a step may have, so that those who decode beside a prompt need not wait.

Sizes are the prompt tokens of a step, some 9 % apart. What a step of a size takes is measured, not
modelled: launches, blocks of kernels and attention that grows with the context are all in it.
"""

from __future__ import annotations

from bisect import bisect_left

LEAST = 64  # prompt tokens of a step at any rate, so that every prompt advances
SIZES_PER_DOUBLING = 8
WEIGHT = 0.2  # of a new measurement, among those before
OUTLIER = 2.0  # times what was expected, or its inverse: believed when the next one says so too
RELUCTANCE = 0.96  # of the target, for sizes above the present one
FRESH = 64  # steps for which a measurement stands by itself
MEMORY = 1024  # steps after which a size that took too long is tried again


class Budget:
    """Tokens of the next step, out of the seconds that steps before have taken.

    Without a target, or with nobody decoding, these are `most`. Else as many prompt tokens as fit
    into the target beside the rows that decode, by what is known of steps like it: what was
    measured lately of a size, else its share of what was measured last, the time of decoding alone
    left out. A larger step costs no more than its share where tokens in bulk are cheaper, so the
    target is approached from below, at most doubling what was measured. A size that took longer
    than its share is passed by for MEMORY steps. What one size takes more or less than it did goes
    for all.
    """

    def __init__(self, most: int, target: float | None = None) -> None:
        assert most >= 1
        self.most = most
        self.target = target
        self.given = most
        steps = range(SIZES_PER_DOUBLING * most.bit_length())
        between = (round(LEAST * 2 ** (i / SIZES_PER_DOUBLING)) for i in steps)
        self.sizes = sorted({min(LEAST, most), *(size for size in between if size < most), most})
        self._size = self.sizes[0]  # given last beside rows that decode
        self._cost: dict[int, float] = {}  # seconds of a step, by size
        self._tried: dict[int, int] = {}  # when that was measured, in steps
        self._last: int | None = None  # the size that was measured last
        self._alone: float | None = None  # seconds of a step of decoding alone
        self._steps = 0
        self._doubted: float | None = None  # the last measurement, if it was not believed

    def give(self, rows: int) -> int:
        """Tokens of the next step, in which so many requests decode."""
        self.given = self.most
        if rows and self.target is not None:
            self._size = next(filter(self._fits, reversed(self.sizes)), self.sizes[0])
            self.given = min(self.most, rows + self._size)
        return self.given

    def learn(self, prompt: int, rows: int, seconds: float) -> None:
        """A step of so many prompt tokens and decoding requests has taken so long.

        Steps without decoding tell nothing of those with, nor do steps that had far fewer prompt
        tokens than they might have had, unless they took too long all the same.
        """
        if self.target is None or not rows or seconds <= 0:
            return
        if not prompt:
            known = seconds if self._alone is None else self._alone
            self._alone = known * self._change(seconds / known)
        elif 2 * prompt >= self._size or (prompt >= LEAST and seconds > self.target):
            self._measured(prompt, seconds)

    def predict(self, size: int) -> float:
        """Seconds of a step with so many prompt tokens, one of `sizes`; infinite: nobody knows."""
        known = self._cost.get(size)
        if known is not None and self._steps - self._tried[size] < FRESH:
            return known
        if self._last is None or size > 2 * self._last:
            return float("inf")
        share = self._share(self._cost[self._last], self._last, size)
        return share if known is None or size < self._last else max(known, share)

    def _fits(self, size: int) -> bool:
        assert self.target is not None
        return self.predict(size) <= self.target * (1 if size <= self._size else RELUCTANCE)

    def _share(self, seconds: float, prompt: int, size: int) -> float:
        """What takes so long with so many prompt tokens, with another number of them."""
        fixed = min(self._alone or 0.0, seconds)
        return fixed + (seconds - fixed) * size / prompt

    def _measured(self, prompt: int, seconds: float) -> None:
        self._steps += 1
        at = bisect_left(self.sizes, prompt)
        size = min(self.sizes[max(at - 1, 0) : at + 1], key=lambda n: abs(n - prompt))
        seconds = self._share(seconds, prompt, size)
        expected = self._cost.get(size, self.predict(size))
        change = self._change(1.0 if expected == float("inf") else seconds / expected)
        if self._doubted is not None:
            return
        if size not in self._cost:
            self._cost[size] = seconds
        elif 1 / OUTLIER <= change <= OUTLIER:  # goes for all sizes
            self._cost = {n: cost * change for n, cost in self._cost.items()}
        else:  # nothing is as it was
            self._cost = {size: seconds}
        self._tried[size], self._last = self._steps, size
        self._tried = {
            n: step for n, step in self._tried.items()
            if n in self._cost and step > self._steps - MEMORY
        }  # fmt: skip
        self._cost = {n: self._cost[n] for n in self._tried}

    def _change(self, ratio: float) -> float:
        """By how much an estimate changes after a measurement of `ratio` times what it says. What
        is far off is no news until it comes twice in a row."""
        doubted, self._doubted = self._doubted, None
        if 1 / OUTLIER <= ratio <= OUTLIER:
            return float(ratio**WEIGHT)
        if doubted is not None and (doubted > 1) == (ratio > 1):
            return ratio
        self._doubted = ratio
        return 1.0
