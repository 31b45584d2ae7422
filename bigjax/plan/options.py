"""What `--action=plan` is asked: the machine, the budget, and how far it goes."""

import dataclasses
import math

from bigjax.run import need


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The flags of `--action=plan`.

    Attributes:
      topology: chips to plan for, such as v5p:8x8x8, 4*v5e:16x16, h100:64 or v5p-1024
      tokens: budget of training in tokens (images, rows); 0 takes --steps times --batch
      price: of one chip-hour, in your currency; 0 tells no price
      fast: closed form only, in seconds: nothing is compiled
      search: tries meshes, remat policies and batch sizes, and ranks them; resumable
      tries: how many of them --search compiles
      json: prints the plan as one JSON object
      libtpu_flags: LIBTPU_INIT_ARGS of the run, which change the compiled program
      compile_timeout: seconds after which one compile is given up for the closed form
    """

    topology: str = ''
    tokens: float = 0.0
    price: float = 0.0
    fast: bool = False
    search: bool = False
    tries: int = 8
    json: bool = False
    libtpu_flags: str = ''
    compile_timeout: int = 1800

    def __post_init__(self) -> None:
        fits = 0 <= self.tokens < math.inf
        need(fits, self, 'tokens', 'must be at least 0 and finite', 1e12)
        fits = 0 <= self.price < math.inf
        need(fits, self, 'price', 'must be at least 0 and finite', 4.2)
        need(self.tries >= 6, self, 'tries', 'must be at least 6, good ones and bad ones', 8)
        fits = self.compile_timeout >= 1
        need(fits, self, 'compile_timeout', 'must be at least 1 second', 1800)
        fits = not (self.fast and self.search)
        need(fits, self, 'fast', 'compiles nothing, and --search compares what is compiled', False)
