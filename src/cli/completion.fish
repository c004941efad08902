
# A list of key=value that is as far as the word before the cursor: keys of $argv[1] for the format that one of the other
# options names, and values of the last key.
function __vimg_list
    set -l words (commandline -opc)
    set -l format
    for option in $argv[2..-1]
        for at in (seq (count $words))
            switch $words[$at]
                case $option
                    set format $words[(math $at + 1)]
                case "$option=*"
                    set format (string replace -- "$option=" '' $words[$at])
                case "-*"
                    # A short one may have its value behind it, and others before it.
                    set -l letter (string sub -s 2 -- $option)
                    string match -qr '^-\w$' -- $option
                    and set -l tail (string match -r -- "^-[a-zA-Z]*$letter(.*)\$" $words[$at])
                    and set format $tail[2]
                    and test -z "$format"
                    and set format $words[(math $at + 1)]
            end
        end
    end
    set -l current (commandline -ct | string replace -r -- '^(--[a-z-]+=|-[a-zA-Z]*o)' '')
    set -l before (string match -r -- '^.*,' $current)
    set -l last (string replace -r -- '^.*,' '' $current)
    set -l key (string match -r -- '^[^=]*(?==)' $last)
    if test -n "$key"
        for value in (__vimg_key_values $argv[1] "$format" $key)
            echo "$before$key=$value"
        end
    else
        for key in (__vimg_keys $argv[1] "$format")
            echo "$before$key="
        end
    end
end
