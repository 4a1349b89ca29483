"""How window and global weight follow sigma. Pure; imports neither torch nor ComfyUI.

Both are defined here for the sampler, which asks at each call, and for the page, which draws them.
"""

from __future__ import annotations

from ..settings.hybrid import HybridSettings


def smoothstep(share: float) -> float:
    """``x²(3 - 2x)`` of a share from 0 to 1: 0, 1/2 and 1 stay, the ends are level."""
    share = min(1.0, max(0.0, share))
    return share * share * (3.0 - 2.0 * share)


def _between(sigma: float, low: float, high: float) -> float:
    """Where sigma lies, 0 at and below ``low``, 1 at and above ``high``."""
    # A float32 step's own sigma, typed as an end, is that end.
    slack = 1e-6 * high
    if sigma <= low + slack:
        return 0.0
    if sigma >= high - slack:
        return 1.0
    return (sigma - low) / (high - low)


def local_window(settings: HybridSettings, sigma: float | None, tokens: int) -> int:
    """Tokens on either side that are exact.

    Args:
        settings: with window and schedule.
        sigma: of the step; None where unknown, which leaves the schedule out.
        tokens: in the sequence; what a window of 0 stands for.

    Returns:
        From 1 to ``tokens``.
    """

    def resolved(window: int) -> int:
        return tokens if window == 0 else min(window, tokens)

    low, high = settings.local_window_sigma_low, settings.local_window_sigma_high
    if sigma is None or high <= low:
        return resolved(settings.local_window)
    least, most = resolved(settings.local_window_min), resolved(settings.local_window_max)
    return round(least + (most - least) * smoothstep(_between(sigma, low, high)))


def global_weight(settings: HybridSettings, sigma: float | None) -> float:
    """Weight of the global part: full at low sigma, 0 at high sigma, even between.

    Args:
        settings: with weight and ramp.
        sigma: of the step; None where unknown, which leaves the ramp out.
    """
    low, high = settings.global_sigma_low, settings.global_sigma_high
    if sigma is None or high <= low:
        return settings.global_weight
    return settings.global_weight * (1.0 - _between(sigma, low, high))
