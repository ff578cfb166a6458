"""x."""

from alm_torchrl.bounds.problem import *  # noqa
from alm_torchrl.bounds.exact import *  # noqa
from alm_torchrl.bounds.objective import *  # noqa
from alm_torchrl.bounds.discounts import *  # noqa
from alm_torchrl.bounds.dynamics import *  # noqa
from alm_torchrl.bounds.offline import *  # noqa
from alm_torchrl.bounds.practice import *  # noqa
from alm_torchrl.bounds.gaps import *  # noqa
from alm_torchrl.bounds.shift import *  # noqa
from alm_torchrl.bounds.ascent import *  # noqa
