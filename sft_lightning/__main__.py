import sys

from sft_lightning.cli.main import main

sys.exit(main())
