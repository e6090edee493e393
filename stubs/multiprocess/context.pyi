from multiprocessing.context import *
from multiprocessing.context import BaseContext as BaseContext
from multiprocessing.context import ForkContext as ForkContext
from multiprocessing.context import ForkProcess as ForkProcess
from typing import Any

def get_spawning_popen() -> Any: ...
