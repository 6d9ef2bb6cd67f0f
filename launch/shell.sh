# shellcheck shell=bash
# What the launch scripts share.

# Ends the script after a user's mistake, like the commands of launch/*.py.
mistake() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# Prints the arguments as one line that a shell reads back as the same arguments.
quote() {
  local argument words=()
  for argument; do
    if [[ ! $argument =~ ^[A-Za-z0-9_./:=@,+-]+$ ]]; then
      argument="'$(printf '%s' "$argument" | sed "s/'/'\\\\''/g")'"
    fi
    words+=("$argument")
  done
  printf '%s' "${words[*]}"
}
