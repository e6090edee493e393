# multiprocess has the API of the standard library's package and no types of its own. With this,
# mypy checks our use of it as it would check the original.

from multiprocessing import *
from multiprocessing import get_context as get_context
