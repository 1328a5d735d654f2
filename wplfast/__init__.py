from . import backends, ops
