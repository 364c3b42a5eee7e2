"""Arrays in few bits: matrix products of training in int8 and fp8, with qwix."""
