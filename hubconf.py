"""Entry points of torch.hub: torch.hub.load('path/of/this/checkout', 'convmlp_s', source='local', pretrained=True)."""

import sys
from pathlib import Path

dependencies = ["torch"]

sys.path.insert(0, str(Path(__file__).parent / "src"))
try:
    from convmlp import convmlp_l, convmlp_m, convmlp_s
finally:
    sys.path.pop(0)

__all__ = ["convmlp_l", "convmlp_m", "convmlp_s"]
