"""The calls of passes and edits together, for test_room_shapes.py: one process checks them all."""

from tests.lens import calls_shape_calls, edits_shape_calls, passes_shape_calls

ROOMS = {"calls": calls_shape_calls, "passes": passes_shape_calls, "edits": edits_shape_calls}
RIGHT = {f"{room}-{name}": call for room, one in ROOMS.items() for name, call in one.RIGHT.items()}
WRONG = {f"{room}-{name}": call for room, one in ROOMS.items() for name, call in one.WRONG.items()}
CALLS = RIGHT | WRONG
