"""The public names, each written once: ``surgery/__init__.py`` reads this file."""

from surgery.checkpoints import Checkpoint as Checkpoint
from surgery.checkpoints import Trajectory as Trajectory
from surgery.live import load_prompts as load_prompts
from surgery.masks import Entries as Entries
from surgery.masks import Neurons as Neurons
from surgery.masks import allocate as allocate
from surgery.masks import top as top
from surgery.measure import harness as harness
from surgery.measure import likelihood as likelihood
from surgery.measure import repair as repair
from surgery.measure import sweep as sweep
from surgery.report import analyse as analyse
from surgery.report import write_report as write_report
from surgery.reverting import rollback as rollback
from surgery.reverting import rolled_back as rolled_back
from surgery.reverting import save as save
from surgery.scores import activation as activation
from surgery.scores import conflict as conflict
from surgery.scores import damage as damage
from surgery.scores import magnitude as magnitude
from surgery.selectors import AMCSelector as AMCSelector
from surgery.selectors import DamageSelector as DamageSelector
from surgery.selectors import RandomSelector as RandomSelector
from surgery.selectors import Selector as Selector
from surgery.selectors import strengths as strengths
from surgery.training import refresh as refresh
