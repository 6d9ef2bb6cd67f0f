"""A page in the browser: `engine` and `shelf` do the work, `page` shows it."""
