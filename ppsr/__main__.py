import sys

from ppsr.cli import main

sys.exit(main())
