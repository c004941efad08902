//! What was probably meant by a name that is not known.

/// The candidate that is the fewest slips away from `word` (letters too many, missing, wrong or swapped), if those are
/// few for its length. Of several the one that has the same letters: those were swapped.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let most = match word.chars().count() {
        0 | 1 => return None,
        2..=4 => 1,
        5..=8 => 2,
        _ => 3,
    };
    let near = candidates.into_iter().map(|candidate| (slips(word, candidate), candidate));
    near.filter(|(slips, _)| *slips <= most)
        .min_by_key(|(slips, candidate)| (*slips, sorted(candidate) != sorted(word)))
        .map(|(_, candidate)| candidate)
}

fn sorted(text: &str) -> Vec<char> {
    let mut letters: Vec<char> = text.to_lowercase().chars().collect();
    letters.sort_unstable();
    letters
}

/// The distance of two words by optimal string alignment (Damerau and Levenshtein), whatever their case.
fn slips(a: &str, b: &str) -> usize {
    let letters = |text: &str| text.to_lowercase().chars().collect::<Vec<_>>();
    let (a, b) = (letters(a), letters(b));
    let mut before: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, y) in b.iter().enumerate() {
            let mut best = (last[j] + usize::from(x != y)).min(last[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && *x == b[j - 1] && a[i - 1] == *y {
                best = best.min(before[j - 1] + 1);
            }
            row.push(best);
        }
        before = std::mem::replace(&mut last, row);
    }
    last.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_slips_are_forgiven() {
        let formats = ["qcow", "qcow2", "vmdk", "vdi", "vhdx", "raw", "parallels"];
        for (word, meant) in [
            ("qcwo2", Some("qcow2")),
            ("QCOW2", Some("qcow2")),
            ("vmkd", Some("vmdk")),
            ("paralels", Some("parallels")),
            ("vhd", Some("vhdx")),
            ("ra", Some("raw")),
            ("iso9660", None),
            ("x", None),
            ("", None),
        ] {
            assert_eq!(nearest(word, formats), meant, "{word}");
        }
        assert_eq!(nearest("rezise", ["rebase", "resize"]), Some("resize"));
        assert_eq!((slips("abc", "acb"), slips("", "ab"), slips("kitten", "sitting")), (1, 2, 3));
    }
}
