"""What came of a check, and which hypothesis explains the numbers that are wrong.

Explained in the section :ref:`test-kit`.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from itertools import combinations, product
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kfac_lib.blocks import SCALES, Block
from kfac_lib.curvature import fisher_blocks
from kfac_lib.exact_cases import ExactCase
from kfac_lib.fisher import TypeII
from kfac_lib.flattening import Order
from kfac_lib.hypotheses import HYPOTHESES, predictions
from kfac_lib.layers import as_matrix, is_supported, kind_of, lookup_of

Status = Literal["passed", "failed", "refused"]
TOLERANCE = 1e-10
"""Relative error up to which numbers count as equal."""
Z_MAX = 6.0
"""How many standard errors the mean of the draws of a random flavour may be off."""


class Measured(NamedTuple):
    """One block as it came back, of one call or of several draws (:ref:`test-kit`).

    Args:
        block: The block.
        draws: Dense matrices, shape (draws, D, D).
        error: Relative error against what is right; NaN if the shape differs.
        right: Whether that is small enough.
    """

    block: Block
    draws: Tensor
    error: float
    right: bool


@dataclass(frozen=True)
class Outcome:
    """What came of one case (:ref:`test-kit`).

    Args:
        case: The case.
        status: ``"passed"``, ``"failed"`` or ``"refused"``.
        error: Largest relative error over the layers, if numbers came back.
        message: What went wrong, or what the callable said when it refused.
        measured: The blocks that came back.
    """

    case: ExactCase
    status: Status
    error: float | None = None
    message: str = ""
    measured: tuple[Measured, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """A hypothesis, and how much of the failures it accounts for (:ref:`test-kit`).

    Args:
        hypothesis: Name of the hypothesis, such as ``"factors swapped"``, with the constant if it
            needs one.
        sentence: What it means.
        explained: How many of the wrong blocks have the numbers that it predicts.
        wrong: How many wrong blocks there are.
        where: What sets the wrong blocks apart from right ones that the hypothesis would make
            wrong, such as ``"only with MSELoss"``; empty if there are none, None if nothing does.
    """

    hypothesis: str
    sentence: str
    explained: int
    wrong: int
    where: str | None = ""

    @property
    def is_complete(self) -> bool:
        """Whether every wrong block is explained, and no right one contradicts it."""
        return 0 < self.explained == self.wrong and self.where is not None

    def __str__(self) -> str:
        where = f", {self.where}" if self.where else ""
        if self.where is None:
            where = ", contradicted by right blocks"
        return f"{self.hypothesis}{where} (explains {self.explained} of {self.wrong} wrong blocks)"


@dataclass(frozen=True)
class Report:
    """The outcome of :func:`check_kfac`, readable as text and as HTML (:ref:`test-kit`).

    Args:
        outcomes: One for each case.
        candidates: The hypotheses that explain anything, best first.
    """

    outcomes: tuple[Outcome, ...]
    candidates: tuple[Explanation, ...] = ()

    def _with(self, status: Status) -> tuple[Outcome, ...]:
        return tuple(outcome for outcome in self.outcomes if outcome.status == status)

    @property
    def failures(self) -> tuple[Outcome, ...]:
        """The cases that came out wrong."""
        return self._with("failed")

    @property
    def refusals(self) -> tuple[Outcome, ...]:
        """The cases that the callable refused, by ``NotImplementedError``."""
        return self._with("refused")

    @property
    def passed(self) -> bool:
        """Whether something passed and nothing failed; what is refused counts as neither."""
        return not self.failures and bool(self._with("passed"))

    @property
    def explanation(self) -> Explanation | None:
        """The hypothesis that explains every wrong block, or None."""
        best = self.candidates[0] if self.candidates else None
        return best if best and best.is_complete else None

    @property
    def runner_up(self) -> Explanation | None:
        """The next best hypothesis, or the best when none explains everything."""
        rest = self.candidates[1:] if self.explanation else self.candidates
        return rest[0] if rest else None

    @property
    def diagnosis(self) -> str:
        """One sentence: what is wrong, as far as the numbers tell."""
        if not self.failures:
            return "nothing is wrong" if self.passed else "nothing was computed"
        wrong = any(not m.right for outcome in self.failures for m in outcome.measured)
        notes = Counter(outcome.message for outcome in self.failures if outcome.message)
        note = notes.most_common(1)[0][0] if notes else ""
        if not wrong:
            compared = any(outcome.measured for outcome in self.failures)
            return f"{'the numbers are right, but it ' if compared else 'no numbers: '}{note}"
        aside = f"; also, it {note}" if note.startswith("changes") else ""
        if self.explanation is None:
            measured = [m for outcome in self.outcomes for m in outcome.measured]
            right = [m for m in measured if m.right]
            common = _branch([m for m in measured if not m.right], right)
            text = "none explains the numbers" + (f"; they are wrong {common}" if common else "")
            best = self.runner_up
            if best and best.explained > 0.5 * best.wrong:
                text += f"; nearest is {best}: mend it and run again if you find it"
            return text + aside
        return f"{self.explanation}: {self.explanation.sentence}{aside}"

    @property
    def summary(self) -> str:
        """One line with the counts."""
        counts = Counter(outcome.status for outcome in self.outcomes)
        verdict = "passed" if self.passed else "failed" if self.failures else "nothing computed"
        return f"{verdict}: " + ", ".join(
            f"{counts[status]} cases {status}" for status in ("passed", "failed", "refused")
        )

    def __repr__(self) -> str:
        lines = [f"check_kfac {self.summary}"]
        rows = list(self._families())
        width = max(len(family) for family, *_ in rows)
        for family, passed, failed, refused, note in rows:
            lines.append(
                f"  {family:<{width}}  {passed:>2} passed  {failed:>2} failed  "
                f"{refused:>2} refused  {note}".rstrip()
            )
        lines.append(f"Diagnosis: {self.diagnosis}.")
        if self.failures and self.runner_up:
            lines.append(f"Runner-up: {self.runner_up}.")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        wraps = ' style="text-align: left; white-space: normal"'
        head = "case", "passed · failed · refused", "largest relative error, or message"
        cells = "".join(f'<th scope="col"{wraps}>{title}</th>' for title in head)
        body = "".join(
            f'<tr><th scope="row"{wraps}>{escape(family)}</th>'
            f"<td>{' · '.join(map(str, numbers))}</td><td{wraps}>{escape(note)}</td></tr>"
            for family, *numbers, note in self._families()
        )
        text = f"<p><strong>Diagnosis:</strong> {escape(self.diagnosis)}.</p>"
        if self.failures and self.runner_up:
            text += f"<p>Runner-up: {escape(str(self.runner_up))}.</p>"
        return (
            f"<p><strong>check_kfac</strong> {escape(self.summary)}</p>"
            f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>{text}"
        )

    def _families(self) -> Iterator[tuple[str, int, int, int, str]]:
        # A KFAC of Linear layers refuses the others by the dozen: one row for each kind.
        answered = {o.case.kind for o in self.outcomes if o.status != "refused"} | {"Linear"}
        rows: dict[str, list[Outcome]] = {}
        for o in self.outcomes:
            row = o.case.family if o.case.kind in answered else f"nets with {o.case.kind}"
            rows.setdefault(row, []).append(o)
        for row, outcomes in rows.items():
            counts = Counter(outcome.status for outcome in outcomes)
            errors = [
                o.error
                for o in outcomes
                if o.error is not None and (o.status == "failed" or not o.case.is_random)
            ]
            messages = [o.message for o in outcomes if o.message]
            note = _rounded(max(errors)) if errors else ""
            if messages:
                note = "; ".join(filter(None, (note, _shortened(messages[0]))))
            yield row, counts["passed"], counts["failed"], counts["refused"], note


@lru_cache(maxsize=2048)
def truth(block: Block) -> Tensor:
    """What is right: the block by autograd alone, or KFAC's definition where KFAC is not exact.

    See :ref:`test-kit`.

    Args:
        block: The block.

    Returns:
        Matrix of shape (D, D), in the order of the block.

    Example:
        >>> from kfac_lib.exact_cases import exact_cases
        >>> truth(Block(exact_cases()[0], layer="0", part="joint", order="cvec")).shape
        torch.Size([16, 16])
    """
    case = block.case
    if not case.is_exact:
        return block.definition
    fisher = TypeII() if case.is_random else case.fisher
    # The weight of an Embedding lies transposed, (D_in, D_out).
    other: dict[Order, Order] = {"cvec": "rvec", "rvec": "cvec"}
    order = other[block.order] if lookup_of(block.module) else block.order
    blocks = fisher_blocks(case.model, case.loss_func, case.data, fisher, order=order)
    joint: Tensor = blocks[block.layer]
    if block.groups == 1 and block.part == "joint":
        return joint
    weight = as_matrix(block.module, case.model.get_parameter(f"{block.layer}.weight".lstrip(".")))
    D_out, entries = len(weight), torch.arange(len(joint))
    D_in = len(joint) // D_out
    group = torch.arange(D_out) * block.groups // D_out
    row, column = (
        (entries % D_out, entries // D_out)
        if block.order == "cvec"
        else (entries // D_in, entries % D_in)
    )
    apart = joint * (group[row][:, None] == group[row])
    if block.part == "joint":
        return apart
    is_bias = column >= D_in - int(block.has_bias)
    chosen = is_bias == (block.part == "bias")
    return apart[chosen][:, chosen]


def measure(block: Block, draws: Sequence[Tensor]) -> Measured:
    """Compare what came back for a block with what is right (:ref:`test-kit`).

    Args:
        block: The block.
        draws: Dense matrices, one for each call.

    Returns:
        The numbers, the relative error of their mean, and whether it is small enough: below 1e-10,
        or within 6 standard errors along several directions where the flavour is random.

    Example:
        >>> from kfac_lib.exact_cases import exact_cases
        >>> block = Block(exact_cases()[0], layer="0", part="joint", order="cvec")
        >>> measure(block, [truth(block)]).right, round(measure(block, [3 * truth(block)]).error, 6)
        (True, 2.0)
    """
    found, right = torch.stack(list(draws)), truth(block)
    if found.shape[1:] != right.shape:
        return Measured(block, found, float("nan"), False)
    error = float((found.mean(0) - right).norm() / right.norm())
    passes = _within_noise(found, right) if block.case.is_random else error < TOLERANCE
    return Measured(block, found, error, passes)


def _within_noise(draws: Tensor, expected: Tensor) -> bool:
    """Is the mean of the draws the expected matrix? A z-test along several directions."""
    directions = _directions(expected)
    seen = draws.flatten(1) @ directions
    off = (seen.mean(0) - expected.flatten() @ directions).abs()
    floor = TOLERANCE * expected.norm() * directions.norm(dim=0)
    return bool((off <= Z_MAX * seen.std(0) / len(draws) ** 0.5 + floor).all())


def _directions(expected: Tensor) -> Tensor:
    D = len(expected)
    generator = torch.Generator().manual_seed(D)
    drawn = torch.randn(D * D, 6, generator=generator, dtype=expected.dtype)
    return torch.cat([expected.reshape(-1, 1), torch.eye(D).reshape(-1, 1).to(drawn), drawn], 1)


def explain(outcomes: Sequence[Outcome]) -> list[Explanation]:
    """Try every hypothesis on the wrong blocks (:ref:`test-kit`).

    Args:
        outcomes: What came of all cases.

    Returns:
        One explanation for each hypothesis that has the numbers of at least one wrong block; those
        that have all of them, and that no right block contradicts, come first.

    Example:
        >>> explain([])
        []
    """
    measured = [m for outcome in outcomes for m in outcome.measured]
    wrong = [m for m in measured if not m.right]
    right = [m for m in measured if m.right]
    names = dict.fromkeys([("scale", "")] if wrong else [])
    for m in wrong:
        names.update(dict.fromkeys(p[:2] for p in predictions(m.block)))
    guesses = []
    for hypothesis, variant in names:
        counts = torch.zeros(len(SCALES))
        for m in wrong:
            counts += _matches(m, _predicted(m.block, hypothesis, variant))
        if hypothesis == "scale":
            counts[0] = 0
        tied = (counts == counts.max()).nonzero().flatten().tolist() if counts.max() > 0 else []
        if all(m.block.case.is_random for m in wrong):
            # The noise of draws leaves room for far-fetched constants.
            tied = [i for i in tied if SCALES[i].complexity <= 2]
        tied.sort(key=lambda i: (SCALES[i].complexity, len(SCALES[i].powers)))
        guesses += [_Guess(hypothesis, (variant,), i, int(counts[i])) for i in tied[:4]]
    for hypothesis in dict.fromkeys(name for name, _ in names):
        # A mistake that shows in several ways, by flavour or by sharing.
        variants = tuple(variant for name, variant in names if name == hypothesis)
        if len(variants) > 1:
            guess = _Guess(hypothesis, variants, 0, 0)
            guesses.append(guess._replace(explained=sum(guess.agrees(m) for m in wrong)))
    rounding = sum(_is_rounding(m) for m in wrong)
    guesses.append(_Guess("float32 inside", ("",), 0, rounding))
    found: dict[str, Explanation] = {}
    for guess in sorted(guesses, key=lambda guess: (-guess.explained, guess.effort)):
        best = found.get(guess.hypothesis)
        if not guess.explained or (best and (best.is_complete or guess.explained < len(wrong))):
            continue
        where: str | None = ""
        if guess.explained == len(wrong):
            where = _branch(wrong, [m for m in right if guess.contradicts(m)])
        if best is None or where is not None:
            sentence = HYPOTHESES[guess.hypothesis] + SCALES[guess.scale].legend
            found[guess.hypothesis] = Explanation(
                guess.name, sentence, guess.explained, len(wrong), where
            )
    # Python's sort is stable: of the complete ones the one that takes least to say comes first.
    return sorted(found.values(), key=lambda e: (not e.is_complete, -e.explained))


class _Guess(NamedTuple):
    hypothesis: str
    variants: tuple[str, ...]
    scale: int
    explained: int

    @property
    def name(self) -> str:
        scale = SCALES[self.scale].name
        if self.hypothesis == "scale":
            return f"scale {scale}"
        variant = self.variants[0] if len(self.variants) == 1 else "in several ways"
        in_brackets = f" ({variant})" if variant else ""
        return f"{self.hypothesis}{in_brackets}{'' if scale == '1' else f', scale {scale}'}"

    @property
    def effort(self) -> float:
        """The less a hypothesis takes to say, the sooner it is believed."""
        structure = 0.0 if self.hypothesis == "scale" else 1.5 + 0.1 * self.name.count(",")
        return SCALES[self.scale].complexity + structure + (len(self.variants) > 1)

    def agrees(self, measured: Measured) -> bool:
        """Are these the numbers of a block?"""
        return any(
            bool(_matches(measured, _predicted(measured.block, self.hypothesis, v))[self.scale])
            for v in self.variants
        )

    def contradicts(self, right: Measured) -> bool:
        """Would a block that is right be wrong under this hypothesis?"""
        if self.hypothesis == "float32 inside":
            return False
        applies = (_predicted(right.block, self.hypothesis, v) is not None for v in self.variants)
        return all(applies) and not self.agrees(right)


def _predicted(block: Block, hypothesis: str, variant: str) -> Tensor | None:
    if hypothesis == "scale":
        return truth(block)
    for prediction in predictions(block):
        if prediction[:2] == (hypothesis, variant):
            return prediction.dense
    # Where a mistake makes no difference the numbers would be right, and these are wrong.
    return None


def _matches(measured: Measured, predicted: Tensor | None) -> Tensor:
    """For every constant, whether it times the prediction gives the numbers that came back."""
    none = torch.zeros(len(SCALES))
    if predicted is None or measured.draws.shape[1:] != predicted.shape:
        return none
    found, size = measured.draws.mean(0), predicted.norm()
    if size == 0 or found.norm() == 0:
        return none + float(size == found.norm())
    ratio = float((found * predicted).sum() / size**2)
    scales = measured.block.scales
    if not measured.block.case.is_random:
        if (found - ratio * predicted).norm() > 1e-8 * found.norm():
            return none
        return ((ratio / scales - 1).abs() < 1e-8).any(0).to(none)
    near = set(scales[(ratio / scales - 1).abs() < 0.4].tolist())
    for value in near:
        if _within_noise(measured.draws, value * predicted):
            none[(scales == value).any(0)] = 1
    return none


def _is_rounding(measured: Measured) -> bool:
    """Is the error of the size of float32's rounding, and not a small multiple of something?"""
    if measured.block.case.is_random or not TOLERANCE < measured.error < 3e-6:
        return False
    right = truth(measured.block)
    residual = (measured.draws[0] - right).flatten()
    terms = [right.flatten()]
    for damped_A, damped_B in product((False, True), repeat=2):
        pairs = []
        for block in measured.block.of_groups():
            A, B = block.factors(*block.rows("right"))
            pairs.append(
                (
                    torch.eye(len(A)).to(A) if damped_A else A,
                    torch.eye(len(B)).to(B) if damped_B else B,
                )
            )
        terms.append(measured.block.dense(*pairs).flatten())
    smooth = torch.stack(terms, dim=1)
    fitted = smooth @ torch.linalg.lstsq(smooth, residual.unsqueeze(1)).solution.squeeze(1)
    return bool((residual - fitted).norm() > 0.5 * residual.norm())


def _attributes(block: Block) -> dict[str, str]:
    case = block.case
    loss = type(case.loss_func).__name__
    layers = [name for name, m in case.model.named_modules() if is_supported(m)]
    return {
        "loss": f"with {loss}",
        "reduction": f"with reduction={case.loss_func.reduction!r}",
        "flavour": f"with {type(case.fisher).__name__}",
        "sharing": f"with {case.sharing}",
        "option": f"with the option {case.option}" if case.option else "without options",
        "positions": "with S > 1" if block.sizes["S"] > 1 else "with S = 1",
        "data": "with one datum" if len(case.data[0]) == 1 else "with several data",
        "layer": "in the last layer" if block.layer == layers[-1] else "in layers before the last",
        "first": "in the first layer" if block.layer == layers[0] else "in layers after the first",
        "bias": "with a bias" if block.has_bias else "without bias",
        "part": f"in the block of the {block.part}",
        "family": f"in the case {case.family!r}",
        "kind": f"in {kind_of(block.module).__name__} layers",
        "convolution": "in convolutions" if _is_convolution(block) else "outside of convolutions",
        "groups": "with groups" if block.groups > 1 else "without groups",
    }


def _is_convolution(block: Block) -> bool:
    return kind_of(block.module).__name__.startswith("Conv")


def _branch(wrong: Sequence[Measured], right: Sequence[Measured]) -> str | None:
    """What sets the wrong blocks apart from right ones: '' if none are right, None if nothing."""
    if not right:
        return ""
    inside = [_attributes(m.block) for m in wrong]
    outside = [_attributes(m.block) for m in right]
    single = [(name,) for name in inside[0]]
    for names in [*single, *combinations(inside[0], 2)]:
        value = [inside[0][name] for name in names]
        if all([a[name] for name in names] == value for a in inside) and not any(
            [a[name] for name in names] == value for a in outside
        ):
            return "only " + " and ".join(value)
    return None


def _rounded(error: float) -> str:
    return (
        "below 1e-10" if error < TOLERANCE else f"{error:.1e}" if error < 0.01 else f"{error:.2f}"
    )


def _shortened(message: str) -> str:
    line = " ".join(message.split())
    return line if len(line) <= 90 else f"{line[:87]}..."
