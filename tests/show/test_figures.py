"""Figures say what their numbers are."""

import pytest

from lib.show import figures


@pytest.mark.parametrize("layers", [12, 18, 30])
def test_there_is_no_tick_between_two_layers(layers):
    fig, ax = figures._panel((5, 3), xlabel="layers summed")
    ax.plot(range(layers + 1))
    fig.canvas.draw()
    assert all(tick == int(tick) for tick in ax.get_xticks()) and len(ax.get_xticks()) > 4
    fig, ax = figures._panel((5, 3), xlabel="share")  # what it would be otherwise
    ax.plot(range(19))
    fig.canvas.draw()
    assert any(tick != int(tick) for tick in ax.get_xticks())
