"""Every loss again as a slow, obvious loop over tokens, and the cases that are compared."""

from __future__ import annotations

import math

import torch

from ray_unlearn.losses import LOSSES

VOCABULARY = 7


PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-6)]


def made(rows, length, dtype=torch.float64, seed=0):
    """Random logits, reference logits, ids of length + 1, and a mask with an empty row."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, length, VOCABULARY, generator=generator, dtype=torch.float64)
    ref = 2 * torch.randn(rows, length, VOCABULARY, generator=generator, dtype=torch.float64)
    ids = torch.randint(VOCABULARY, (rows, length + 1), generator=generator)
    mask = torch.rand(rows, length, generator=generator) < 0.6
    if rows > 2:
        mask[1] = False
    return logits.to(dtype), ref.to(dtype), ids, mask


def picked(logits, ids):
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def given(logits, ref, ids, mask):
    """Every tensor that a loss may ask for, by name. Alternatives are the same rows read backwards; the hidden
    states are the logits themselves, and a row's control is the reference's first."""
    back, alt_mask = ids.flip(1), mask.flip(1)
    return {
        "mask": mask,
        "logps": picked(logits, ids),
        "ref_logps": picked(ref, ids),
        "logits": logits[mask],
        "ref_logits": ref[mask],
        "targets": ids[:, 1:][mask],
        "noise": ref[mask],
        "hidden": logits[mask],
        "ref_hidden": ref[mask],
        "control": ref[:, 0],
        "alt_mask": alt_mask,
        "alt_logps": picked(logits, back),
        "alt_ref_logps": picked(ref, back),
    }


def fast_value(name, logits, ref, ids, mask, options):
    tensors = given(logits, ref, ids, mask)
    return LOSSES[name].compute(*(tensors[key] for key in LOSSES[name].tensors), **options)


def log_probability(row, t, v):
    """Log-probability of entry v at position t, from logits as lists."""
    top = max(row[t])
    return row[t][v] - top - math.log(sum(math.exp(x - top) for x in row[t]))


def softmax(scores):
    total = sum(math.exp(x) for x in scores)
    return [math.exp(x) / total for x in scores]


def mean(values):
    return sum(values) / len(values) if values else 0.0


def minus_log_sigmoid(x):
    return math.log1p(math.exp(-x)) if x > -30 else -x


class Slow:
    """One batch as lists; `frozen` are the logits wherever a loss takes no gradient."""

    pool = False

    def __init__(self, logits, ref, ids, mask, frozen=None):
        self.logits, self.ref, self.ids, self.mask = (x.tolist() for x in (logits, ref, ids, mask))
        self.frozen = self.logits if frozen is None else frozen.tolist()
        self.rows = range(len(self.ids))

    def value(self, name, options):
        self.pool = options.get("pool", False)
        return getattr(self, name)(**{key: value for key, value in options.items() if key != "pool"})

    def shown(self, b):
        return [t for t in range(len(self.mask[b])) if self.mask[b][t]]

    def logp(self, b, t, of=None):
        return log_probability((self.logits if of is None else of)[b], t, self.ids[b][t + 1])

    def by_row(self, token):
        """Mean over rows of each row's mean of token(b, t); of all tokens alike where they are pooled."""
        if self.pool:
            return self.pooled(token)
        return mean([mean([token(b, t) for t in self.shown(b)]) for b in self.rows])

    def pooled(self, token):
        return mean([token(b, t) for b in self.rows for t in self.shown(b)])

    def dist(self, b, t, of):
        return [log_probability(of[b], t, v) for v in range(VOCABULARY)]

    def cross_entropy(self):
        return self.by_row(lambda b, t: -self.logp(b, t))

    def gradient_ascent(self, bound=math.inf):
        if self.pool:
            return -min(self.pooled(lambda b, t: -self.logp(b, t)), bound)
        return -mean([min(mean([-self.logp(b, t) for t in self.shown(b)]), bound) for b in self.rows])

    def weighted_ascent(self, beta):
        return self.by_row(lambda b, t: math.exp(self.logp(b, t, self.frozen)) ** beta * self.logp(b, t))

    def satimp(self, beta1, beta2):
        def token(b, t):
            p = math.exp(self.logp(b, t, self.frozen))
            return p**beta1 * (1 - p) ** beta2 * self.logp(b, t)

        return self.by_row(token)

    def logit_margin(self):
        return self.by_row(lambda b, t: (max(self.logits[b][t]) - mean(self.logits[b][t])) ** 2)

    def npo(self, beta, ratio):
        def difference(b, t):
            return self.logp(b, t) - self.logp(b, t, self.ref)

        if ratio == "token":
            return self.pooled(lambda b, t: 2 / beta * minus_log_sigmoid(-beta * difference(b, t)))
        if ratio == "batch":
            return 2 / beta * minus_log_sigmoid(-beta * self.pooled(difference))
        total = {"sum": sum, "mean": mean}[ratio]
        ratios = [total([difference(b, t) for t in self.shown(b)]) for b in self.rows]
        return mean([2 / beta * minus_log_sigmoid(-beta * x) for x in ratios])

    def simnpo(self, beta, delta):
        losses = [mean([-self.logp(b, t) for t in self.shown(b)]) for b in self.rows]
        return mean([2 / beta * minus_log_sigmoid(beta * (loss - delta)) for loss in losses])

    def dpo(self, beta):
        values = []
        for b in self.rows:
            answer = sum(self.logp(b, t) - self.logp(b, t, self.ref) for t in self.shown(b))
            length, back = len(self.mask[b]), self.ids[b][::-1]
            other = sum(
                log_probability(self.logits[b], t, back[t + 1]) - log_probability(self.ref[b], t, back[t + 1])
                for t in range(length)
                if self.mask[b][length - 1 - t]
            )
            values.append(2 / beta * minus_log_sigmoid(beta * (other - answer)))
        return mean(values)

    def kl_divergence(self, direction="reference"):
        def token(b, t):
            pairs = zip(self.dist(b, t, self.ref), self.dist(b, t, self.logits), strict=True)
            if direction == "model":
                return sum(math.exp(m) * (m - r) for r, m in pairs)
            return sum(math.exp(r) * (r - m) for r, m in pairs)

        return self.by_row(token)

    def noise_kl(self):
        return self.kl_divergence()

    def target_kl(self):
        def token(b, t):
            r = self.logp(b, t, self.ref)
            return math.exp(r) * (r - self.logp(b, t))

        return self.pooled(token)

    def renyi_divergence(self, alpha):
        def token(b, t):
            pairs = zip(softmax(self.ref[b][t]), softmax(self.logits[b][t]), strict=True)
            return math.log(sum(r**alpha * m ** (1 - alpha) for r, m in pairs)) / (alpha - 1)

        return self.by_row(token)

    def undial(self, beta):
        def token(b, t):
            target = self.ids[b][t + 1]
            teacher = softmax([x - beta * (v == target) for v, x in enumerate(self.ref[b][t])])
            return -sum(q * m for q, m in zip(teacher, self.dist(b, t, self.logits), strict=True))

        return self.by_row(token)

    def ce_u(self, skip):
        values = []
        for b in self.rows:
            tokens = []
            for t in self.shown(b)[skip:]:
                target = self.ids[b][t + 1]
                p = softmax(self.frozen[b][t])
                rest = sum(x for v, x in enumerate(p) if v != target)
                logs = self.dist(b, t, self.logits)
                tokens.append(-sum(x / rest * logs[v] for v, x in enumerate(p) if v != target))
            values.append(tokens)
        if self.pool:
            return mean([token for tokens in values for token in tokens])
        return mean([mean(tokens) for tokens in values])

    def _distance(self, b, t, other):
        return mean([(x - y) ** 2 for x, y in zip(self.logits[b][t], other, strict=True)])

    def rmu(self):
        return self.by_row(lambda b, t: self._distance(b, t, self.ref[b][0]))

    def hidden_mse(self):
        return self.by_row(lambda b, t: self._distance(b, t, self.ref[b][t]))


CASES = [
    ("cross_entropy", {}),
    ("gradient_ascent", {}),
    ("gradient_ascent", {"bound": 2.5}),
    ("weighted_ascent", {"beta": 0.7}),
    ("satimp", {"beta1": 2.0, "beta2": 0.5}),
    ("logit_margin", {}),
    ("npo", {"beta": 0.1, "ratio": "sum"}),
    ("npo", {"beta": 0.7, "ratio": "mean"}),
    ("npo", {"beta": 0.4, "ratio": "batch"}),
    ("npo", {"beta": 0.5, "ratio": "token"}),
    ("simnpo", {"beta": 2.5, "delta": 0.3}),
    ("dpo", {"beta": 0.3}),
    ("kl_divergence", {}),
    ("kl_divergence", {"direction": "model"}),
    ("target_kl", {}),
    ("renyi_divergence", {"alpha": 0.5}),
    ("renyi_divergence", {"alpha": 1.7}),
    ("undial", {"beta": 3.0}),
    ("ce_u", {"skip": 0}),
    ("ce_u", {"skip": 1}),
    ("noise_kl", {}),
    ("rmu", {}),
    ("hidden_mse", {}),
]


MEANS = [name for name in LOSSES if "pool" in LOSSES[name].options]
CASES += [(name, options | {"pool": True}) for name, options in CASES if name in MEANS]
POOLED = [("npo", "batch"), ("npo", "token"), ("target_kl", None)]
