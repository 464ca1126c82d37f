"""Write the Python blocks of the documents into this folder."""

from . import write_blocks

write_blocks()
