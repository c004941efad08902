
# Completes a list of key=value that is as far as $3, in front of which stands $4: keys of $1 for the format $2, or values of the last key.
_vimg_list() {
    local last=${3##*,} before
    before=${3%"$last"}
    if [[ $last == *=* ]]; then
        COMPREPLY=($(compgen -P "$4$before${last%%=*}=" -W "$(_vimg_key_values "$1" "$2" "${last%%=*}")" -- "${last#*=}"))
    else
        COMPREPLY=($(compgen -P "$4$before" -W "$(_vimg_keys "$1" "$2")" -- "$last"))
        compopt -o nospace 2>/dev/null
    fi
}

# Whether a value follows the option $2 of the command $1; one that need not be there stands behind '='.
_vimg_wants() {
    local takes
    takes=$(_vimg_takes "$1" "$2") && [[ $takes != optional* ]]
}

# Where the letter of the word $2 is whose value is all that follows, if there is one.
_vimg_letter() {
    local at
    for ((at = 1; at < ${#2}; at++)); do
        _vimg_wants "$1" "-${2:at:1}" && echo "$at" && return
    done
    return 1
}

# The option of the command $1 whose value is the word behind $2.
_vimg_awaits() {
    local at
    case $2 in
        --*) _vimg_wants "$1" "$2" && echo "$2" ;;
        -?*) at=$(_vimg_letter "$1" "$2") && ((at == ${#2} - 1)) && echo "-${2:at}" ;;
    esac
}

_vimg() {
    local line=${COMP_LINE:0:COMP_POINT} words=() command= option= value= lead= format= takes kind rest word said value_said letter at operands=0
    COMPREPLY=()
    # Words as the shell will see them: for its completion '=' and ':' end one.
    read -ra words <<<"$line"
    [[ $line == *[[:space:]] ]] && words+=('')
    local last=$((${#words[@]} - 1))
    ((last > 0)) || return
    for ((at = 1; at < last; at++)); do
        case ${words[at]} in
            --*=*) ;;
            -*) [[ $(_vimg_awaits "$command" "${words[at]}") ]] && at=$((at + 1)) ;;
            *) if [[ $command ]]; then operands=$((operands + 1)); else command=${words[at]}; fi ;;
        esac
    done

    # The value of which option is it, if of one?
    local current=${words[last]}
    case $current in
        --*=*) option=${current%%=*} value=${current#*=} lead=$option= ;;
        --*) ;;
        -??*)
            at=$(_vimg_letter "$command" "$current") &&
                option=-${current:at:1} value=${current:at + 1} lead=${current:0:at + 1}
            ;;
        *)
            option=$(_vimg_awaits "$command" "${words[last - 1]}")
            value=$current
            ;;
    esac
    if [[ $option ]] && takes=$(_vimg_takes "$command" "$option"); then
        read -r kind rest <<<"$takes"
        case $kind in
            words | optional | nothing)
                COMPREPLY=($(compgen -P "$lead" -W "$rest" -- "$value"))
                # No file would do.
                compopt +o default +o bashdefault 2>/dev/null
                ;;
            keys)
                # For the format that the options named behind it say.
                read -r kind rest <<<"$rest"
                for ((at = 1; at < ${#words[@]} - 1; at++)); do
                    word=${words[at]}
                    case $word in
                        --*=*) said=${word%%=*} value_said=${word#*=} ;;
                        -[!-]*)
                            letter=$(_vimg_letter "$command" "$word") || continue
                            said=-${word:letter:1} value_said=${word:letter + 1} ;;
                        --*) said=$word value_said= ;;
                        *) continue ;;
                    esac
                    [[ " $rest " == *" $said "* ]] && format=${value_said:-${words[at + 1]}}
                done
                _vimg_list "$kind" "$format" "$value" "$lead"
                ;;
        esac
    elif [[ $current == -* ]]; then
        COMPREPLY=($(compgen -W "$(_vimg_options "$command")" -- "$current"))
    elif [[ ! $command || $command == help ]]; then
        COMPREPLY=($(compgen -W "$(_vimg_commands)" -- "$current"))
    elif [[ $current != *=* ]] && takes=$(_vimg_operands "$command"); then
        COMPREPLY=($(compgen -W "$takes" -- "$current"))
        compopt -o nospace 2>/dev/null
    elif [[ $operands == "$(_vimg_sized "$command")" ]]; then
        # It is a size.
        compopt +o default +o bashdefault 2>/dev/null
    fi

    # What is before the last of these, bash leaves alone.
    local ends= done=
    [[ $COMP_WORDBREAKS == *=* ]] && ends+='='
    [[ $COMP_WORDBREAKS == *:* ]] && ends+=':'
    [[ $ends ]] && done=${current%"${current##*[$ends]}"}
    COMPREPLY=("${COMPREPLY[@]#"$done"}")
}

# What none of this completes is the name of a file.
complete -o bashdefault -o default -F _vimg vimg
