"""The pages in which people rank answers, and the owner of a study reads its figures."""
