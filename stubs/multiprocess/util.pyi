from multiprocessing.util import *
