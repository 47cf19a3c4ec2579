"""Every gradient of one preference pair: token by token, in four ways, and as a graph."""

from .graphs import Graph as Graph
from .graphs import Node as Node
from .graphs import graph as graph
from .tokens import END as END
from .tokens import PairView as PairView
from .tokens import TokenView as TokenView
from .tokens import context_gradient as context_gradient
from .tokens import context_logits as context_logits
from .tokens import context_logprobs as context_logprobs
from .tokens import context_rows as context_rows
from .tokens import double as double
from .tokens import pair as pair
from .tokens import quoted as quoted
from .ways import Ways as Ways
from .ways import four_ways as four_ways
from .ways import largest_differences as largest_differences
from .ways import sums as sums
