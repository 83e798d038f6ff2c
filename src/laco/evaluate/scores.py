"""Scores of answers: exact match, Wilson's interval, character error rate. All rates are per cent."""

from math import sqrt


def same(answer: str, truth: str) -> bool:
    """Exact match after stripping and lower-casing."""
    return answer.strip().lower() == truth.strip().lower()


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `hits` in `n` trials, in per cent (Wilson 1927)."""
    share = hits / n
    centre = share + z * z / (2 * n)
    spread = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 100 / (1 + z * z / n)
    return max(scale * (centre - spread), 0.0), min(scale * (centre + spread), 100.0)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance: insertions, deletions and substitutions that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, char in enumerate(a, 1):
        left, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            left, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, left + (char != other))
    return row[-1]


def character_error_rate(answers: list[str], truths: list[str]) -> float:
    """Edits for every 100 characters of the truth, case ignored; above 100 where answers ramble."""
    pairs = [(a.strip().lower(), t.strip().lower()) for a, t in zip(answers, truths, strict=True)]
    return 100 * sum(edit_distance(a, t) for a, t in pairs) / max(sum(len(t) for _, t in pairs), 1)
