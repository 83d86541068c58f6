"""Figures of recommenders against scikit-learn's."""

from __future__ import annotations

import math

import numpy as np
import pytest

from recommender.metrics import BINS, Curve, Errors, Lists, area, ndcg_at, normalized_entropy, recall_at

sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")


def counted(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray, cuts: int) -> np.ndarray:
    """By `cuts` tallies, whose counts are added."""
    total = np.zeros(2 * BINS)
    for part in np.array_split(np.arange(len(scores)), cuts):
        tally = Curve()
        for rows in np.array_split(part, 3):
            tally.add({"label": labels[rows], "row_weight": weights[rows]}, {"score": (scores[rows], 1.0)})
        total += tally.counts
    return total


@pytest.mark.parametrize("spread", [0.05, 1.0, 4.0, 30.0])
def test_area_under_the_curve(spread: float) -> None:
    """Scores beyond the range fall into its outermost bins; close ones share a bin and count as ties."""
    random = np.random.default_rng(0)
    labels = (random.random(20_000) < 0.2).astype(np.float32)
    scores = spread * (random.standard_normal(20_000) + labels)
    weights = (random.random(20_000) < 0.9).astype(np.float32)
    real = weights > 0
    wanted = sklearn.roc_auc_score(labels[real], scores[real])
    counts = counted(scores, labels, weights, 4)
    found = Curve().figures(counts, {"loss": 0.5, "base_rate": 0.2})["auc"]
    assert found == pytest.approx(wanted, abs=1e-5 if spread < 5 else 5e-2)
    assert np.array_equal(counts, counted(scores, labels, weights, 1)), "the same whatever the cut"
    assert counts.sum() == real.sum()
    shared = float((counts[:BINS] * counts[BINS:]).sum()) / float(counts[:BINS].sum() * counts[BINS:].sum())
    assert abs(found - wanted) <= shared / 2 + 1e-12, "the bound that is promised"


def test_ties_and_a_single_class() -> None:
    labels, scores = np.array([0, 1, 0, 1, 1.0]), np.array([0, 0, 1, 1, 1.0])
    assert area(*(np.bincount(scores[labels == side].astype(int), minlength=2) for side in (0, 1))) == pytest.approx(
        sklearn.roc_auc_score(labels, scores))
    assert area(np.array([3.0, 4.0]), np.zeros(2)) == 0.5


def test_normalised_entropy() -> None:
    random = np.random.default_rng(1)
    labels, chances = (random.random(5000) < 0.3).astype(float), random.uniform(0.05, 0.95, 5000)
    loss, always = sklearn.log_loss(labels, chances), sklearn.log_loss(labels, np.full(5000, labels.mean()))
    assert normalized_entropy(loss, float(labels.mean())) == pytest.approx(loss / always, rel=1e-9)
    assert normalized_entropy(0.1, 0.0) == 1.0


def test_root_mean_square() -> None:
    found, wanted = np.random.default_rng(2).standard_normal((2, 100))
    assert Errors().figures(np.array([100.0]),
                            {"loss": float(np.mean((found - wanted) ** 2))})["rmse"] == pytest.approx(
        sklearn.root_mean_squared_error(wanted, found))


@pytest.mark.parametrize("k", [1, 5, 40])
def test_rankings(k: int) -> None:
    random = np.random.default_rng(3)
    scores, gains = random.standard_normal((50, 30)), random.integers(0, 4, (50, 30)) * (random.random((50, 30)) < 0.2)
    some = gains.sum(1) > 0
    # scikit-learn's ndcg_score discounts linear gains by log2, as ours does
    assert ndcg_at(k, scores, gains) == pytest.approx(sklearn.ndcg_score(gains[some], scores[some], k=k), rel=1e-9)
    relevant = (gains > 0).astype(int)
    by_hand = [sum(relevant[u, i] for i in sorted(range(30), key=lambda i: -scores[u, i])[:k]) / relevant[u].sum()
               for u in np.flatnonzero(some)]
    assert recall_at(k, scores, relevant) == pytest.approx(math.fsum(by_hand) / len(by_hand))
    assert recall_at(k, scores, np.zeros_like(relevant)) == ndcg_at(k, scores, np.zeros_like(gains)) == 0.0


@pytest.mark.parametrize("k", [1, 3, 50])
def test_equal_scores_do_not_rank_by_row(k: int) -> None:
    """Of rounded scores many are equal, and what is relevant comes first, as in tables that list it before what was
    drawn beside it."""
    random = np.random.default_rng(6)
    gains = -np.sort(-random.integers(0, 3, (20, 12)), 1).astype(float)
    scores = np.round(random.standard_normal((20, 12)))
    scores[0] = 0.0
    assert ndcg_at(k, scores, gains) == pytest.approx(sklearn.ndcg_score(gains, scores, k=k), rel=1e-9)
    relevant = (gains > 0).astype(int)
    shuffled = [recall_at(k, (scores + random.random(scores.shape) * 0.1), relevant) for _ in range(2000)]
    assert recall_at(k, scores, relevant) == pytest.approx(np.mean(shuffled), abs=4 * np.std(shuffled) / 2000 ** 0.5
                                                           + 1e-12)


def test_scores_that_are_no_numbers() -> None:
    """A model may diverge in the step before an evaluation: the run ends by its loss, not by a count."""
    tally = Curve()
    tally.add({"label": np.array([1.0, 0.0, 1.0]), "row_weight": np.ones(3)},
              {"score": (np.array([np.nan, -np.inf, np.inf]), 3.0)})
    assert tally.counts.sum() == 3 and tally.counts[BINS // 2 + BINS] == tally.counts[0] == tally.counts[-1] == 1


def test_lists_of_an_evaluation() -> None:
    """Rows of a list lie anywhere, in batches of several members; ours against scikit-learn's and a set of names."""
    random = np.random.default_rng(4)
    lists, labels, scores = random.integers(0, 12,
                                            200), (random.random(200) < 0.3).astype(float), random.standard_normal(200)
    lists[lists == 5] = 4  # a list that is not there
    labels[lists == 7] = 0  # one with nothing relevant
    members = [Lists(Curve(), 200, 3, True) for _ in range(2)]
    for number, rows in enumerate(np.array_split(random.permutation(200), 9)):
        rows = np.concatenate([rows, [0]])  # a filler
        batch = {"row": rows, "group": lists[rows], "label": labels[rows],
                 "row_weight": (np.arange(len(rows)) < len(rows) - 1).astype(float)}
        members[number % 2].add(batch, {"score": (scores[rows], 1.0)})
    found = members[0].figures(members[0].counts + members[1].counts, {"loss": 0.5, "base_rate": 0.3})
    assert set(found) == {"recall_at_3", "ndcg_at_3", "auc", "normalized_entropy"}
    gains, recalls = [], []
    for name in sorted(set(lists.tolist()) - {7}):
        own = np.flatnonzero(lists == name)
        gains.append(sklearn.ndcg_score(labels[None, own], scores[None, own], k=3))
        best, relevant = set(sorted(own.tolist(),
                                    key=lambda row: -scores[row])[:3]), {row for row in own.tolist() if labels[row]}
        recalls.append(len(best & relevant) / len(relevant))
    assert found["ndcg_at_3"] == pytest.approx(np.mean(gains)) and found["recall_at_3"] == pytest.approx(np.mean(recalls))
    assert found["auc"] == pytest.approx(sklearn.roc_auc_score(labels, scores), abs=1e-3)
