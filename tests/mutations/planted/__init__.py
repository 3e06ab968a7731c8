"""The mistakes that are planted, each with the tests that have to catch it, by subject."""

from tests.mutations.planted import (
    attention,
    budgets,
    controller,
    conversion,
    dispatching,
    hybrid,
    losses,
    relu,
    routing,
    sequences,
    thresholds,
    watching,
)

MUTATIONS = [
    *controller.MISTAKES,
    *routing.MISTAKES,
    *sequences.MISTAKES,
    *thresholds.MISTAKES,
    *relu.MISTAKES,
    *losses.MISTAKES,
    *dispatching.MISTAKES,
    *attention.MISTAKES,
    *conversion.MISTAKES,
    *hybrid.MISTAKES,
    *budgets.MISTAKES,
    *watching.MISTAKES,
]
