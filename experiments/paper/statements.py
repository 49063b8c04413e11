"""What the paper claims, in one list: commands refer to it by id, and `claims` goes through it."""

from typing import NamedTuple


class Statement(NamedTuple):
    """A claim of the paper.

    Attributes:
        id: By which ``outcome.Claim`` refers to it.
        text: The claim.
        place: Where it stands; its first section counts.
        command: Who looks at it.
    """

    id: str
    text: str
    place: str
    command: str


# All that the paper says and that numbers can decide, in its order.
STATEMENTS = (
    Statement("lemmas", "The updates of Lemmas 1 to 6 attain the dual norms", "section 2", "norms"),
    Statement(
        "ky-fan-dual",
        "The dual of the Ky Fan k-norm is max(nuclear norm / k, spectral norm)",
        "section 2.8",
        "norms",
    ),
    Statement(
        "fanion-ends", "Muon is the min(m, n)-Fanion, Neon the 1-Fanion", "section 2.8", "norms"
    ),
    Statement(
        "table-1",
        "NSGD, SignSGD, Signum, Muon, coordinate descent and Neon are steepest descents in the "
        "balls of Table 1",
        "section 2.9, Table 1",
        "norms",
    ),
    Statement("neon-training", "Neon underperforms in training networks", "section 2.9", "nanogpt"),
    Statement(
        "trlan-faster",
        "TRLan is much faster than RSVD and power iterations at equal error",
        "section 3, Table 2",
        "topk",
    ),
    Statement(
        "rsvd-sigma",
        "RSVD approximates singular values better, TRLan the matrix of rank k",
        "section 3",
        "topk",
    ),
    Statement(
        "gaussian-norms",
        "Norms of Gaussian m x n matrices: nuclear ~ n sqrt(m), Frobenius ~ sqrt(mn), spectral ~ "
        "sqrt(m) + sqrt(n)",
        "section 4",
        "bounds",
    ),
    Statement(
        "square-norms",
        "On square Gaussian matrices Frobenius ~ sqrt(n)/2 spectral and nuclear ~ n/2 spectral",
        "section 4",
        "bounds",
    ),
    Statement(
        "proportional-norms",
        "The Frobenius, nuclear and spectral norms are almost proportional to each other for large "
        "random matrices",
        "section 4",
        "bounds",
    ),
    Statement(
        "dual-gamma",
        "If a norm is ~ gamma times the Frobenius norm, its dual is ~ 1 / gamma times it",
        "section 5.1",
        "bounds",
    ),
    Statement(
        "smoothness",
        "L is |M|_F |N|_F (NSGD), 2/n |M|_* |N|_* (Muon), n |M|_op |N|_op (Neon): for n = 50 "
        "16.2, 171.4, 47.7",
        "section 5.1",
        "bounds",
    ),
    Statement(
        "step-sizes",
        "Lemma 7 gives the learning rates 2.33e-4 (Muon), 2.10e-2 (Neon), 1.75e-2 (NSGD) and 68, "
        "11919, 323 iterations",
        "section 5.1",
        "bounds",
    ),
    Statement(
        "theory-practice",
        "The theoretical L and step sizes do not relate well to practice",
        "section 5.1",
        "least_squares",
    ),
    Statement(
        "neon-loss",
        "Neon converges worst in terms of the loss",
        "section 5.1, Figure 1",
        "least_squares",
    ),
    Statement(
        "neon-gradient",
        "Neon is a leader in terms of the norm of the gradient",
        "section 5.1, Figure 1",
        "least_squares",
    ),
    Statement(
        "f-muon-robust",
        "F-Muon is more robust than Muon on least squares",
        "section 5.1, Figure 1",
        "least_squares",
    ),
    Statement(
        "airbench-equal",
        "Tuned F-Muon (94.01 ± 0.14 %) and Muon (94.00 ± 0.13 %) are equal",
        "section 5.2",
        "airbench",
    ),
    Statement(
        "alpha-0.1",
        "At the tuned settings alpha = 0.1 is far more accurate than NSGD",
        "section 5.2, Figure 2b",
        "airbench",
    ),
    Statement(
        "alpha-outside",
        "Alpha > 1 and alpha < 0, which are no norms, reach almost the accuracy of Muon",
        "section 5.2, Figure 2",
        "airbench",
    ),
    Statement(
        "outside-ball",
        "F-Muon with alpha outside [0, 1] has the steps of no norm ball",
        "section 5.2",
        "balls",
    ),
    Statement(
        "nanogpt-equal",
        "F-Muon with alpha = 0.5 is only marginally worse than Muon (3.281, 3.279)",
        "section 5.3",
        "nanogpt_alpha",
    ),
    Statement(
        "nanogpt-negative",
        "Alpha = -0.1, which is no norm, is not worse than alpha = 0.3 (3.2818)",
        "section 5.3",
        "nanogpt_alpha",
    ),
    Statement(
        "lanczos-newton-schulz",
        "The Lanczos algorithm is much faster than Newton-Schulz iterations on large matrices",
        "section 6",
        "topk",
    ),
    Statement(
        "error-feedback",
        "Error feedback may be necessary for low-rank updates, F-Neon's among them (left open)",
        "section 6",
        "ranks",
    ),
    Statement(
        "lemma-9",
        "The dual ball of a sum of norms is the Minkowski sum of their dual balls",
        "appendix B, Lemma 9",
        "norms",
    ),
    Statement(
        "blend-duals",
        "The duals of F* and F2 are the minima of equations (22) and (23)",
        "appendix B",
        "norms",
    ),
    Statement(
        "blend-balls",
        "The ball of the dual of F* (F2) is the sum of alpha times the nuclear (spectral) ball and "
        "1 - alpha times the Frobenius ball",
        "appendix C.1, Figure 4",
        "balls",
    ),
    Statement(
        "ky-fan-balls",
        "The Ky Fan 2-ball is an intersection of three l1-balls, its dual that of an l_inf-ball of "
        "radius 1 and an l1-ball of radius 1/2",
        "appendix C.2, Figure 5",
        "balls",
    ),
    Statement(
        "draft-ahead",
        "F-Muon surpasses Muon's accuracy on CIFAR-10 by a margin",
        "draft, section 1",
        "airbench",
    ),
    Statement(
        "draft-neon-cost",
        "Neon's updates are asymptotically cheaper than Muon's by Newton-Schulz iterations",
        "draft, section 1",
        "topk",
    ),
)
