from multiprocessing.context import *
