//! Which group each input feature belongs to, where groups were formed in another order than that of the features.

use super::{I32, Module, WeightsError, word};

/// What a list of groups, one for each input feature, comes to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Groups of neighbours.
    Features,
    /// Groups are full once the features stand in this order.
    By(Vec<u32>),
    /// Groups of more or fewer features than they should have.
    Ragged,
}

/// Reads the list `name` of a module, if it has one, and checks it. Tensors of another shape or type are left to the proof.
///
/// Its zeros alone mean nothing: so do tools leave a list that they do not use.
pub(super) fn read(
    module: &Module<'_>,
    name: &str,
    group: Option<usize>,
) -> Result<(Order, Option<Vec<u32>>), WeightsError> {
    let cols = module.shape[1];
    let wanted = module.wanted(name, [cols], I32);
    if !matches!(wanted.check(module.source), Ok(Some(_))) {
        return Ok((Order::Features, None));
    }
    let raw = wanted.read(module.source)?;
    let list: Vec<u32> = (0..cols).map(|col| word(&raw.bytes, col)).collect();
    let groups = group.map_or(1, |group| cols.div_ceil(group));
    if let Some(bad) = list.iter().find(|&&index| index as usize >= groups) {
        return Err(wanted.value(format!("groups below {groups}"), bad.cast_signed()));
    }
    let order = order_of(&list, group);
    Ok((order, Some(list)))
}

/// The order of the input features by which groups of `group` are of neighbours.
fn order_of(list: &[u32], group: Option<usize>) -> Order {
    let size = group.unwrap_or(usize::MAX);
    let is_at = |index: &u32, place: usize| *index as usize == place / size;
    if list.iter().all(|&index| index == 0) || list.iter().enumerate().all(|(col, index)| is_at(index, col)) {
        return Order::Features;
    }
    let mut order: Vec<u32> = (0..list.len() as u32).collect();
    order.sort_by_key(|&col| list[col as usize]); // stable
    let full = order.iter().enumerate().all(|(place, &col)| is_at(&list[col as usize], place));
    if full { Order::By(order) } else { Order::Ragged }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_sorted_by_group() {
        assert_eq!(order_of(&[0, 0, 1, 1, 2], Some(2)), Order::Features);
        assert_eq!(order_of(&[0, 0, 0, 0], Some(2)), Order::Features);
        assert_eq!(order_of(&[0, 0, 0, 0], None), Order::Features);
        assert_eq!(order_of(&[1, 0, 2, 0, 1], Some(2)), Order::By(vec![1, 3, 0, 4, 2]));
        assert_eq!(order_of(&[1, 0, 1, 1], Some(2)), Order::Ragged);
    }
}
