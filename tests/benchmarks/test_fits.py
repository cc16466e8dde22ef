"""The fits behind the scaling tables, on data whose law is known."""
import numpy as np
import pytest

from benchmarks.fits import fit_line, fit_power


def test_a_line_is_found_with_its_start_and_slope():
    line = fit_line([1, 2, 4, 8], [7, 9, 13, 21])
    assert (line.intercept, line.slope) == pytest.approx((5, 2))
    assert line.r_squared == pytest.approx(1) and line.residual == pytest.approx(0, abs=1e-12)


def test_the_residual_is_relative_to_the_time_it_belongs_to():
    sizes, times = [0, 1, 2, 3], [10.0, 20.0, 30.0, 50.0]
    slope, intercept = np.polyfit(sizes, times, 1)
    line = fit_line(sizes, times)
    assert (line.intercept, line.slope) == pytest.approx((intercept, slope))
    worst = max(abs(time - intercept - slope * size) / time for size, time in zip(sizes, times))
    assert line.residual == pytest.approx(worst)
    assert line.r_squared == pytest.approx(np.corrcoef(sizes, times)[0, 1] ** 2)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_a_power_law_has_its_exponent_everywhere(exponent):
    sizes = [100, 300, 1000, 3000]
    power = fit_power(sizes, [0.7 * size ** exponent for size in sizes])
    assert power.exponent == pytest.approx(exponent) and power.last == pytest.approx(exponent)
    assert power.r_squared == pytest.approx(1)


def test_a_constant_cost_hides_a_square_less_between_the_last_two_sizes():
    sizes = [100, 1000, 10000]
    power = fit_power(sizes[::-1], [1000 + size ** 2 / 1000 for size in sizes[::-1]])
    assert power.exponent == pytest.approx(1.0) and 1.7 < power.last < 2


@pytest.mark.parametrize("fit", [fit_line, fit_power])
@pytest.mark.parametrize("sizes, times", [([5], [1.0]), ([5, 5], [1.0, 2.0]), ([1, 2], [1.0])])
def test_too_few_sizes_are_refused(fit, sizes, times):
    with pytest.raises(ValueError, match="two sizes"):
        fit(sizes, times)
