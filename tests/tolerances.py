"""How close is equal. Errors are relative to the RMS of the reference, so that one number serves arrays of any scale.

float64 shows structure: any term left out or misplaced is many orders above these. float32 shows numerics: sums in
another order differ by about sqrt(terms) * 1e-7. None of them is widened to let a test pass.
"""

from collections.abc import Mapping

import numpy as np

FLOAT64 = 1e-10  # outputs
FLOAT64_GRADIENT = 1e-9  # sums over batch and tokens of products of many such errors
FLOAT32 = 1e-5
# Another order of the same float32 operations: sharded, scanned, jitted against not.
FLOAT32_REORDERED = 1e-5
# bfloat16 keeps 8 bits, and two right programs differ in the last of them: ours and torch are each compared with
# float64, by the RMS of their errors, and ours must not be further off (0.8 to 0.92 of torch's was measured).
BFLOAT16_RATIO = 1.0
# IDEFICS' decoder rounds where torch does, so that neither is closer: 0.89 to 1.11 by the weights, and 1.00 in the
# geometric mean over ten sets of them, whose standard error is 0.02. So does GLM-4V: 0.99 from pixels to logits over
# twenty sets (standard error 0.03), 0.98 to 1.02 in its tower.
BFLOAT16_RATIO_DECODER = 1.05


def error(actual: object, expected: object, floor: float = 0.0) -> float:
    """The largest difference, over the RMS of `expected` (or over `floor`, if that is larger)."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"shapes {actual.shape} and {expected.shape}"
    assert np.isfinite(actual).all(), "not finite"
    if not expected.size:
        return 0.0
    scale = max(np.sqrt(np.mean(np.square(expected))), floor)
    return float(np.max(np.abs(actual - expected)) / (scale if scale > 0 else 1.0))


def assert_close(actual: object, expected: object, tolerance: float, what: str = "", floor: float = 0.0) -> None:
    """Fails with the name of the array and the error found."""
    found = error(actual, expected, floor)
    assert found <= tolerance, f"{what}: error {found:.2e} of the RMS, {tolerance:.0e} allowed"


def assert_gradients_close(
    actual: Mapping[str, object], expected: Mapping[str, object], tolerance: float = FLOAT64_GRADIENT
) -> None:
    """Every gradient by name, relative to its own RMS.

    Some are zero but for rounding (a softmax does not feel the bias of its keys; 1e-13 of the RMS over the whole model
    is left of it): a gradient's scale counts as at least a thousandth of that RMS.
    """
    assert actual.keys() == expected.keys()
    arrays = {name: np.asarray(gradient, np.float64) for name, gradient in expected.items()}
    total = sum(float(np.square(array).sum()) for array in arrays.values())
    floor = 1e-3 * np.sqrt(total / sum(array.size for array in arrays.values()))
    for name, array in arrays.items():
        assert_close(actual[name], array, tolerance, f"gradient of {name}", floor)
