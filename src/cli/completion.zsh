
# A list of key=value: keys of $1 for the format that one of the other words names, as an option.
_vimg_list() {
    local -a known
    local option format=
    for option in ${@:2}; do
        format=${opt_args[$option]:-$format}
    done
    known=(${(f)"$(_vimg_keys "$1" "$format")"})
    _values -s , option $known
}

# What dd takes: files by their keys, and numbers.
_vimg_dd() {
    if compset -P '(if|of)='; then
        _files
    elif [[ $PREFIX != *=* ]]; then
        compadd -S '' -- $(_vimg_dd_keys)
    fi
}
