"""What Dataflow's launcher runs: the Flex Template (pipeline/flex_template.py)."""

import sys

from pipeline.flex_template import main

if __name__ == "__main__":
    sys.exit(main())
