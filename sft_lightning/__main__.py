import sys

from sft_lightning.cli import main

sys.exit(main())
