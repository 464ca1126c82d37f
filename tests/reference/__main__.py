"""Write the generated pages of docs/reference/."""

from . import write_pages

write_pages()
