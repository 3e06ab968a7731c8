"""The mistakes that are planted, each with the tests that have to catch it."""

from tests.mutations.planted.attention import ATTENTION
from tests.mutations.planted.control import CONTROLLER
from tests.mutations.planted.dispatch import DISPATCHING
from tests.mutations.planted.routing import LOSS, ROUTING
from tests.mutations.planted.runs import WATCHING

MUTATIONS = [*CONTROLLER, *ROUTING, *LOSS, *DISPATCHING, *ATTENTION, *WATCHING]
