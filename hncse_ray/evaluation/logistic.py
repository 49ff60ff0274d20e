"""Many logistic regressions on one set of features, fitted together: what cross-validation asks for.

L2-penalised, with a free intercept, solved to convergence by a batched L-BFGS (Nocedal 1980) on rotated features.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hncse_ray.evaluation.vectors import FloatArray

logger = logging.getLogger(__name__)

# A fit has converged when the logits of its rows are this near to the optimum's: a root mean square, weighted by the
# curvature of the loss.
_LOGIT_TOLERANCE = 1e-5
_MAX_ITERATIONS = 500
_MEMORY = 10  # pairs of L-BFGS


def principal_axes(x_ND: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Centre and rotate the features, and add a column of ones; also the variance of each column.

    Neither changes the optimum: the penalty does not see a rotation, the free intercept takes up a shift. But the
    Hessian of every fit is now nearly diagonal, and its diagonal is known before the fit.
    """
    x_ND = x_ND - x_ND.mean(axis=0, dtype=np.float64).astype(x_ND.dtype)
    spread_D, axes_DD = np.linalg.eigh((x_ND.T @ x_ND).astype(np.float64) / len(x_ND))
    z_ND = np.empty((len(x_ND), x_ND.shape[1] + 1), dtype=x_ND.dtype)
    np.matmul(x_ND, axes_DD.astype(x_ND.dtype), out=z_ND[:, :-1])
    z_ND[:, -1] = 1
    return z_ND, np.append(spread_D.clip(min=0), 1).astype(x_ND.dtype)


def logistic_regressions(
    z_ND: FloatArray, y_N: NDArray[np.integer[Any]], used_NP: FloatArray, spread_D: FloatArray, *, strength: float
) -> FloatArray:
    """Minimise ``|w|^2 / 2 + strength * sum of log-losses`` for P subsets of the same rows at once.

    L-BFGS in lockstep, with the inverse of the Hessian's diagonal as its scale, so that P problems cost two matrix
    products an iteration; a step is halved until the loss falls enough, from logits that are linear in its length.

    Args:
        z_ND: features on their principal axes, the last one the constant of the intercept, which is not penalised.
        y_N: labels 0 .. classes - 1; two classes are one logit, more are a softmax.
        used_NP: 1 where row n belongs to problem p, else 0.
        spread_D: mean square of each feature.
        strength: C of scikit-learn.

    Returns:
        Weights ``[D, P, M]`` for M logits.
    """
    dtype, (N, D), P = z_ND.dtype, z_ND.shape, used_NP.shape[1]
    classes = int(y_N.max()) + 1
    M = classes if classes > 2 else 1
    target_N1M = (y_N[:, None] == (np.arange(M) if M > 1 else 1)).astype(dtype)[:, None]
    used_NP1 = used_NP[:, :, None]
    penalty_D = np.append(np.ones(D - 1), 0).astype(dtype)[:, None, None]
    curvature = 1 / 4 if M == 1 else 1 / M  # of the log-loss where all classes are as likely
    rows_P = used_NP.sum(axis=0)
    scale_D = 1 / (penalty_D + strength * rows_P.max() * curvature * spread_D[:, None, None])

    def gradient(w: FloatArray, residual: FloatArray) -> FloatArray:
        product: FloatArray = (z_ND.T @ residual.reshape(N, P * M)).reshape(D, P, M)
        return penalty_D * w + dtype.type(strength) * product

    def objective(w: FloatArray, logits: FloatArray) -> tuple[FloatArray, FloatArray]:
        losses_NP, residual = _log_loss(logits, target_N1M)
        data_P = np.einsum("np,np->p", losses_NP, used_NP, dtype=np.float64)
        return 0.5 * _dots(penalty_D * w, w) + strength * data_P, residual * used_NP1

    w, logits = np.zeros((D, P, M), dtype), np.zeros((N, P, M), dtype)
    loss_P, residual = objective(w, logits)
    g = gradient(w, residual)
    pairs: list[tuple[FloatArray, FloatArray, FloatArray]] = []
    slack = 10 * np.finfo(dtype).eps  # a loss that is the same but for rounding has not risen
    for _ in range(_MAX_ITERATIONS):
        if np.all(_dots(g * scale_D, g) <= _LOGIT_TOLERANCE**2 * strength * rows_P):
            break
        step = _lbfgs_direction(g, scale_D, pairs)
        slope_P = _dots(g, step)
        step_logits = (z_ND @ step.reshape(D, P * M)).reshape(N, P, M)
        length_P = np.ones(P)
        for _ in range(30):
            length_P1 = length_P.astype(dtype)[:, None]
            moved, moved_logits = w + length_P1 * step, logits + length_P1 * step_logits
            moved_loss_P, residual = objective(moved, moved_logits)
            too_far_P = moved_loss_P > loss_P + 1e-4 * length_P * slope_P + slack * np.abs(loss_P)
            if not too_far_P.any():
                break
            length_P[too_far_P] /= 2
        g_moved = gradient(moved, residual)
        change, bend = moved - w, g_moved - g
        product_P = _dots(change, bend)
        # Without curvature (a problem that is done but for rounding) the pair is not used.
        curved_P = product_P > np.finfo(dtype).tiny
        pairs.append((change, bend, np.where(curved_P, 1 / np.where(curved_P, product_P, 1), 0)))
        del pairs[:-_MEMORY]
        w, logits, loss_P, g = moved, moved_logits, moved_loss_P, g_moved
    else:
        logger.warning("a logistic regression (C = %g) has not converged in %d steps", strength, _MAX_ITERATIONS)
    return w


def _log_loss(logits_NPM: FloatArray, target_N1M: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Losses ``[N, P]``, and their derivatives by the logits ``[N, P, M]``: probability minus target."""
    if logits_NPM.shape[2] == 1:
        small = np.exp(-np.abs(logits_NPM))  # from the side that cannot overflow
        losses = np.log(1 + small) + np.maximum(logits_NPM, 0) - target_N1M * logits_NPM
        return losses[:, :, 0], np.where(logits_NPM > 0, 1, small) / (1 + small) - target_N1M
    # numpy's own reductions over a handful of classes cost more than the matrix products.
    logits_NPM = logits_NPM - reduce(np.maximum, np.moveaxis(logits_NPM, 2, 0))[:, :, None]
    powers = np.exp(logits_NPM)
    total = (powers.reshape(-1, powers.shape[2]) @ np.ones(powers.shape[2], powers.dtype)).reshape(powers.shape[:2])
    losses_NP = np.log(total) - np.einsum("npm,nqm->np", logits_NPM, target_N1M)
    return losses_NP, powers / total[:, :, None] - target_N1M


def _lbfgs_direction(
    g: FloatArray, scale_D: FloatArray, pairs: Sequence[tuple[FloatArray, FloatArray, FloatArray]]
) -> FloatArray:
    """The two loops of L-BFGS (Nocedal & Wright 2006, algorithm 7.4), for each problem on its own."""
    q = -g
    weights = []
    for change, bend, inverse_P in reversed(pairs):
        weight_P1 = (inverse_P * _dots(change, q)).astype(g.dtype)[:, None]
        weights.append(weight_P1)
        q = q - weight_P1 * bend
    q = scale_D * q
    if pairs:
        change, bend, inverse_P = pairs[-1]
        fit_P = inverse_P * _dots(bend * scale_D, bend)
        q = q / np.where(fit_P > 0, fit_P, 1).astype(g.dtype)[:, None]
    for (change, bend, inverse_P), weight_P1 in zip(pairs, reversed(weights), strict=True):
        q = q + (weight_P1 - (inverse_P * _dots(bend, q)).astype(g.dtype)[:, None]) * change
    return q


def _dots(a_DPM: FloatArray, b_DPM: FloatArray) -> FloatArray:
    products: FloatArray = np.einsum("dpm,dpm->p", a_DPM, b_DPM, dtype=np.float64)
    return products
